"""The `mixtera-hpc` command. `verbs/` has one module per verb; the modules here are what verbs share."""
