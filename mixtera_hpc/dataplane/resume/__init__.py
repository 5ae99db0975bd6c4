"""Resuming of a run: saved states, edits of a run, and what identifies it."""
