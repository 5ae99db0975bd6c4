"""Data files: one protocol for every format, and what they share."""
