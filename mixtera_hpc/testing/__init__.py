"""Conformance suites for implementations of this package's protocols, and small data sets for tests.

Each suite is a tuple `CHECKS` of functions that raise AssertionError: communicators, formats, mixing algorithms,
tokenizers.
"""
