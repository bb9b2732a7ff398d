"""Notebooks in batch: run, watched and copied."""
