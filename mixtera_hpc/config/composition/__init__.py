"""What Hydra composes from: folders, the schema in its ConfigStore, experiments, overrides, and messages."""
