"""The `mixtera-hpc` command: one module per verb. Verbs parse arguments, call the library and print."""
