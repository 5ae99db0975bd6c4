"""What the verbs about several runs answer: `runs`, `watch` and `fork`."""
