"""Serve token ids that are stored on disk, without a Python object per document."""
