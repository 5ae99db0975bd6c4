"""The query language: expressions over properties, and their evaluation on samples and on whole blocks."""
