"""Slurm jobs and attempts of runs: run folders, batch scripts, submission, status, logs, cancelling, sweeps."""
