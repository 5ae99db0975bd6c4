"""Swarms of proxy runs: sample mixtures, collect their losses, fit regressions, propose a mixture."""
