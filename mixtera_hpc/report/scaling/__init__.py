"""Scaling: throughput against the number of ranks, its files, and a model of larger jobs."""
