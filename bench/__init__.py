"""Benchmarks against peers or physical limits, measured in the same run. See `python -m bench --help`."""
