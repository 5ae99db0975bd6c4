"""Rows that stay in memory after their unit was decoded."""
