"""Sweeps: their points, the record of what was submitted, job arrays, and sweeps on this machine."""
