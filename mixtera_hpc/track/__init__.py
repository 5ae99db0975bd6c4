"""Record and read the metric events of a run."""
