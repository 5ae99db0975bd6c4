"""Run mixing algorithms on recorded losses."""
