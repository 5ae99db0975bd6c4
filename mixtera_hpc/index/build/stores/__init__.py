"""Stores of tokens and rows that an index build makes, extends or keeps."""
