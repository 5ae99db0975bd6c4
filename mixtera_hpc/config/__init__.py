"""Configuration: the schema, composition with Hydra, checks, and the paths of a run."""
