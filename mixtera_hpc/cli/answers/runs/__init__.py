"""Answers of the verbs `runs`, `watch` and `fork`."""
