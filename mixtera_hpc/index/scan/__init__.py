"""Scan the units of shards on all ranks, and log the results so that a killed build continues."""
