"""Reports on learned mixtures."""
