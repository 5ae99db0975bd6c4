"""The verbs of `mixtera-hpc`: one module each, with `arguments(parser)` and `run(args) -> int`."""
