"""The reduction of each step over all ranks."""
