"""Composition with Hydra: folders, the schema in its ConfigStore, experiments, overrides, and messages."""
