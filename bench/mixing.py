"""Held-out loss per domain of fixed, learned and proposed mixtures at the same budget, over several seeds.

    python -m bench mixing [--corpus synthetic] [--mixture swarm] [--seeds 3] [--swarm synthetic=mixture.yaml]

Trains small models one after the other in this process, on one thread. Finished runs are skipped, so the command can be
ended and repeated at any time. Prints a table per corpus and writes bench/out/mixing.json. All runs together take
about 20 CPU-minutes. docs/mixing_evidence.md has the results.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench._mixing.corpora import CORPORA, Corpus
from bench._mixing.mixtures import MIXTURES, Mixture, proposed
from bench._mixing.runs import Runs, run_verb
from bench._mixing.swarm import train_swarm
from bench._mixing.tables import lines, summary
from bench._results import OUT, write_results

FOLDER = OUT / "mixing"
SWARM = "swarm"
NAMES = (*(mixture.name for mixture in MIXTURES), SWARM)


def main() -> None:
    """Train what is missing, one seed of all mixtures after the other; then print the tables."""
    options = _parse(sys.argv[1:])
    runs = Runs(root=FOLDER / "runs")
    corpora = [_prepare(name) for name in options.corpus]
    proposals = dict(_proposal(word) for word in options.swarm)
    by_corpus = {c.name: _mixtures(c, options.mixture, proposals.get(c.name)) for c in corpora}
    for seed in range(1, options.seeds + 1):
        for corpus in corpora:
            for mixture in by_corpus[corpus.name]:
                _train(runs, corpus, mixture, seed)
    content = {}
    for corpus in corpora:
        rows = summary(runs, corpus, [mixture.name for mixture in by_corpus[corpus.name]], options.seeds)
        print("\n".join(["", f"{corpus.name}: {corpus.num_steps} steps, {options.seeds} seeds", *lines(corpus, rows)]))
        content[corpus.name] = [row.as_dict(corpus) for row in rows]
    write_results("mixing", content)


def _train(runs: Runs, corpus: Corpus, mixture: Mixture, seed: int) -> None:
    overrides = list(mixture.overrides(corpus))
    if mixture.needs_reference:
        reference = runs.folder(corpus, "uniform", seed).path
        overrides.append(f"+mixture.algorithm.from_run={reference}")
    cpu_s = runs.train(corpus, mixture.name, overrides, seed)
    result = runs.result(corpus, mixture.name, seed)
    if cpu_s and result is not None:
        clock = time.strftime("%H:%M:%S")
        loss = " ".join(f"{value:.3f}" for value in result.loss)
        print(f"{clock} {corpus.name} {mixture.name} seed {seed}: {cpu_s:.0f} CPU-s, {loss}", flush=True)


def _prepare(name: str) -> Corpus:
    """Write the corpus and build its index, unless they exist."""
    corpus = CORPORA[name](FOLDER)
    if not (FOLDER / f"{name}.h5").exists():
        run_verb(["index", "build", *corpus.overrides], FOLDER / f"{name}-index.log")
    return corpus


def _mixtures(corpus: Corpus, names: Sequence[str], proposal: Path | None) -> list[Mixture]:
    """Return the mixtures to compare; without a proposal of a swarm, its proxies are trained."""
    chosen = [mixture for mixture in MIXTURES if mixture.name in names]
    if SWARM not in names:
        return chosen
    return [*chosen, proposed(proposal or train_swarm(FOLDER, corpus))]


def _proposal(word: str) -> tuple[str, Path]:
    corpus, _, path = word.partition("=")
    if corpus not in CORPORA or not path:
        raise SystemExit(f"--swarm is {word!r}, expected CORPUS=PATH with one of the corpora {', '.join(CORPORA)}.")
    return corpus, Path(path)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench mixing")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--corpus", action="append", choices=list(CORPORA), help="only this corpus; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--mixture", action="append", choices=NAMES, help="only natural and this mixture; may be repeated"
    )
    parser.add_argument(
        "--swarm",
        action="append",
        default=[],
        metavar="CORPUS=mixture.yaml",
        help="the proposal of another swarm; without it, proxies are trained",
    )
    options, _ = parser.parse_known_args(words)
    options.corpus = options.corpus or list(CORPORA)
    # Every table compares with the first mixture, the natural one.
    options.mixture = [NAMES[0], *options.mixture] if options.mixture else list(NAMES)
    return options


if __name__ == "__main__":
    main()
