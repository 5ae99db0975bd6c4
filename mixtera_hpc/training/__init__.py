"""The reference trainer: a small GPT trained with data parallelism on a data plane."""
