"""Conformance suites, shipped: what every implementation of one of our protocols must do."""
