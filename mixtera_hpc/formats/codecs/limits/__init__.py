"""Bound decoded sizes from metadata, before anything is decoded."""
