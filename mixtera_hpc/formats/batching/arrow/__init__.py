"""Batches from Arrow tables: what Parquet and Arrow files have in common.

Arrow's objects have the type Any here, because pyarrow ships no type information.
"""
