"""Look up many positions of many streams in one pass of numpy, without Python per domain or window."""
