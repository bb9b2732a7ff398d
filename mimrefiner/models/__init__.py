"""Encoders: built, named, loaded and written."""
