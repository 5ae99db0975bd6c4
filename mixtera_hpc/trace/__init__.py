"""Trace what a run served: list, locate, compare, verify and forecast, offline from index and journal."""
