"""Parts of `python -m bench mixing`: corpora, mixtures, runs and the table."""
