"""Documents of text as tokens."""
