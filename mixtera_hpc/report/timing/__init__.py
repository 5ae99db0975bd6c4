"""Reports on the time of a run."""
