"""Train the proxies of `mixtera-hpc swarm` on a corpus of `python -m bench mixing`, and propose a mixture."""

from pathlib import Path

from bench._mixing.corpora import Corpus
from bench._mixing.runs import run_verb

__all__ = ["train_swarm"]

NUM_PROXIES = 12
PROXY_DIVISOR = 2
"""Proxies have the steps of a run divided by this."""


def train_swarm(folder: Path, corpus: Corpus) -> Path:
    """Train the proxies that are missing; return the file of the proposed mixture.

    Raises:
        SystemExit: a verb failed; its output is beside the folder of the swarm.
    """
    swarm = folder / "swarm" / corpus.name
    log = swarm.with_suffix(".log")
    num_steps = corpus.num_steps // PROXY_DIVISOR
    words = [
        *corpus.overrides,
        "mixture=natural",
        f"swarm.num_proxies={NUM_PROXIES}",
        f"training.num_steps={num_steps}",
        f"training.validate_every={num_steps}",
        f"run.root={folder / 'swarm' / 'runs'}",
    ]
    run_verb(["swarm", "sample", str(swarm), *words], log)
    run_verb(["swarm", "train", str(swarm)], log)
    run_verb(["swarm", "fit", str(swarm)], log)
    return swarm / "mixture" / f"{corpus.name}-proposal.yaml"
