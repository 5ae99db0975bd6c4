"""Combos by their values: which combinations of categorical values a domain key matches."""
