"""Compression and container formats: where segments begin, and how to decode one of them."""
