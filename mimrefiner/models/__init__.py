"""Encoders: built, named, loaded and written; what counts as a block."""
