"""The order of one mixture as each system makes it, in a process of its own: `python bench/_plan_peers.py NAME SAMPLES`.

Prints one JSON object. Runs under any interpreter that has the system named; nothing of this repository is imported but for
`mixtera-hpc` itself. All get seven domains in SlimPajama's shares and each its own defaults for everything else.
"""

import importlib.util
import json
import resource
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

SHARES = np.array([0.522, 0.267, 0.052, 0.042, 0.046, 0.038, 0.033])
WINDOW = 1024
GRAIN_SAMPLES = 1_000_000
"""Grain looks positions up one by one in Python; the deviation over its first million stands for the rest."""

Marks = dict[str, Any]


def mixtera_hpc(num_samples: int) -> tuple[Marks, np.ndarray]:
    """Chunks of 8 steps of 1024 sequences; planned, then expanded as the reading thread of every rank does."""
    from mixtera_hpc.core.planner import Planner, PlannerState

    endless = np.full(len(SHARES), Planner.UNLIMITED)
    planner = Planner(capacity=endless, global_batch_size=1024, chunk_steps=8, on_exhausted="repeat")
    began, before = time.perf_counter(), peak_bytes()
    state, plans = PlannerState.start(len(SHARES)), []
    while state.step * 1024 < num_samples:
        plan, state = planner.plan(state, SHARES)
        plans.append(plan)
        if len(plans) == 1:
            first_s = time.perf_counter() - began
    planned_s = time.perf_counter() - began
    planner.slots(plans[-1])
    bytes_, expand = peak_bytes() - before, time.perf_counter()
    domain = np.concatenate([planner.slots(p).domain.astype(np.int8) for p in plans])[:num_samples]
    per_sample = (time.perf_counter() - expand) / num_samples
    return {"first_s": first_s, "plan_s": planned_s, "bytes": bytes_, "expand_us": per_sample * 1e6}, domain


def mosaic(num_samples: int) -> tuple[Marks, np.ndarray]:
    """`generate_work` of a StreamingDataset whose seven streams are given by proportion; shuffled, as by default."""
    spec = importlib.util.find_spec("streaming")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'streaming'")
    package = types.ModuleType("streaming")  # Its own __init__ imports torchvision, which planning does not need.
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["streaming"] = package
    from streaming.base.batching import generate_work
    from streaming.base.dataset import StreamingDataset
    from streaming.base.world import World

    shards, rows = 500, 4096
    choose = np.floor(SHARES / SHARES.sum() * num_samples).astype(int)
    count = len(SHARES) * shards
    dataset = types.SimpleNamespace(
        num_canonical_nodes=64,
        batch_size=1024,
        partition_algo="relaxed",
        epoch_size=int(choose.sum()),
        initial_physical_nodes=1,
        shuffle=True,
        shuffle_block_size=1 << 18,
        shuffle_algo="py1e",
        shuffle_seed=9176,
        sampling_method="balanced",
        sampling_granularity=1,
        epoch_seed_change=True,
        num_streams=len(SHARES),
        shard_offset_per_stream=np.arange(len(SHARES)) * shards,
        shards_per_stream=np.full(len(SHARES), shards),
        samples_per_shard=np.full(count, rows),
        sample_offset_per_shard=np.arange(count) * rows,
        streams=[types.SimpleNamespace(choose=int(n)) for n in choose],
    )
    dataset.resample_streams = types.MethodType(StreamingDataset.resample_streams, dataset)
    marks, work = timed(lambda: generate_work("random", dataset, World(1, 1, 1, 0), 0, 0))
    ids = work.transpose(3, 0, 1, 2, 4).reshape(-1)
    return marks, (ids[ids >= 0] // (shards * rows)).astype(np.int8)


def megatron(num_samples: int) -> tuple[Marks, np.ndarray]:
    """The two index arrays that BlendedDataset builds, with its own compiled helper."""
    from megatron.core.datasets import helpers_cpp

    def build() -> np.ndarray:
        dataset, sample = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
        helpers_cpp.build_blending_indices(dataset, sample, SHARES / SHARES.sum(), len(SHARES), num_samples, False)
        return dataset

    return timed(build)


def grain(num_samples: int) -> tuple[Marks, np.ndarray]:
    """`MapDataset.mix`; the dataset of a position is computed when the position is asked for."""
    from grain.python import MapDataset

    far = 1 << 40
    sources = [MapDataset.range(k * far, k * far + num_samples) for k in range(len(SHARES))]
    marks, mixed = timed(lambda: MapDataset.mix(sources, weights=SHARES.tolist()))
    began = time.perf_counter()
    domain = np.fromiter((mixed[i] // far for i in range(min(num_samples, GRAIN_SAMPLES))), np.int8)
    marks["expand_us"] = (time.perf_counter() - began) / len(domain) * 1e6
    return marks, domain


def huggingface(num_samples: int) -> tuple[Marks, np.ndarray]:
    """`interleave_datasets` of map-style datasets with probabilities, until the first is exhausted."""
    from datasets import Dataset, disable_progress_bars, interleave_datasets

    disable_progress_bars()
    sizes = (SHARES / SHARES.sum() * num_samples).astype(int)
    sources = [Dataset.from_dict({"domain": np.full(n, k, np.int8)}) for k, n in enumerate(sizes)]
    shares = (SHARES / SHARES.sum()).tolist()
    marks, mixed = timed(lambda: interleave_datasets(sources, probabilities=shares, seed=0))
    return marks, np.asarray(mixed.with_format("numpy")["domain"][:], np.int8)


SYSTEMS: dict[str, Callable[[int], tuple[Marks, np.ndarray]]] = {
    "mixtera-hpc": mixtera_hpc,
    "mosaic": mosaic,
    "megatron": megatron,
    "grain": grain,
    "huggingface": huggingface,
}
PACKAGES = {"mosaic": "mosaicml-streaming", "megatron": "megatron-core", "grain": "grain", "huggingface": "datasets"}


def timed(build: Callable[[], Any]) -> tuple[Marks, Any]:
    """For systems that plan everything before the first sample."""
    before, began = peak_bytes(), time.perf_counter()
    made = build()
    took = time.perf_counter() - began
    return {"first_s": took, "plan_s": took, "bytes": peak_bytes() - before}, made


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def deviations(domain: np.ndarray) -> Marks:
    """Largest differences between count and share, in sequences."""
    shares, marks = SHARES / SHARES.sum(), {"window": 0.0, "aligned": 0.0, "prefix": 0.0}
    for number, share in enumerate(shares):
        lag = np.concatenate([[0], np.cumsum(domain == number)]) - share * np.arange(len(domain) + 1)
        moved = np.abs(lag[WINDOW:] - lag[:-WINDOW])
        for name, found in {"window": moved, "aligned": moved[::WINDOW], "prefix": np.abs(lag)}.items():
            marks[name] = max(marks[name], float(found.max()))
    return marks


def main(name: str, num_samples: int) -> None:
    """Measure one system."""
    from importlib.metadata import version

    marks, domain = SYSTEMS[name](num_samples)
    known = version(PACKAGES[name]) if name in PACKAGES else "this one"
    print(json.dumps({"name": name, "version": known, "samples": len(domain), **marks, **deviations(domain)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
