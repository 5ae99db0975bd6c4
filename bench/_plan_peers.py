"""Plan one mixture with one system, in its own process: `python bench/_plan_peers.py NAME NUM_SAMPLES`.

Prints one JSON object. The script runs under any interpreter that has the system installed, and imports this repository
only for `mixtera-hpc`. Every system gets seven domains in SlimPajama's proportions and uses its own defaults for
everything else.
"""

import importlib.metadata
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
"""Number of consecutive samples in which the deviation is measured."""
GRAIN_SAMPLES = 1_000_000
"""Grain looks up samples one by one in Python, so its deviation is measured only over this many samples."""

Measured = dict[str, Any]
"""first_s: time to the first plan. plan_s: time to plan all samples. bytes: memory of the plans. expand_us: time per
sample to find its domain, where that is a separate step."""


def mixtera_hpc(num_samples: int) -> tuple[Measured, np.ndarray]:
    """Plan chunks of 8 steps of 1,024 sequences, then expand the plans as the reading thread of every rank does."""
    from mixtera_hpc.core.chunk_plan import PlannerState
    from mixtera_hpc.core.planner import Planner
    from mixtera_hpc.core.slots.batch_schedule import BatchSchedule

    planner = Planner(
        capacity=np.full(len(SHARES), Planner.UNLIMITED),
        batch_schedule=BatchSchedule.constant(1024),
        chunk_steps=8,
        on_exhausted="repeat",
    )
    bytes_before = peak_bytes()
    started = time.perf_counter()
    state = PlannerState.start(len(SHARES))
    plans = []
    while state.step * 1024 < num_samples:
        plan, state = planner.plan(state, SHARES)
        plans.append(plan)
        if len(plans) == 1:
            first_s = time.perf_counter() - started
    plan_s = time.perf_counter() - started
    planner.slots(plans[-1])
    plan_bytes = peak_bytes() - bytes_before

    started = time.perf_counter()
    domain = np.concatenate([planner.slots(plan).domain.astype(np.int8) for plan in plans])[:num_samples]
    expand_us = (time.perf_counter() - started) / num_samples * 1e6
    return {"first_s": first_s, "plan_s": plan_s, "bytes": plan_bytes, "expand_us": expand_us}, domain


def mosaic(num_samples: int) -> tuple[Measured, np.ndarray]:
    """Call `generate_work` of a StreamingDataset with seven streams given by proportion, shuffled as by default."""
    spec = importlib.util.find_spec("streaming")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'streaming'")
    # The package's own __init__ imports torchvision, which planning does not need.
    package = types.ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["streaming"] = package
    from streaming.base.batching import generate_work
    from streaming.base.dataset import StreamingDataset
    from streaming.base.world import World

    num_shards = 500
    shard_rows = 4096
    dataset = _mosaic_dataset(num_samples, num_shards, shard_rows)
    dataset.resample_streams = types.MethodType(StreamingDataset.resample_streams, dataset)
    measured, work = timed(lambda: generate_work("random", dataset, World(1, 1, 1, 0), 0, 0))
    ids = work.transpose(3, 0, 1, 2, 4).reshape(-1)
    # Negative ids are padding.
    return measured, (ids[ids >= 0] // (num_shards * shard_rows)).astype(np.int8)


def _mosaic_dataset(num_samples: int, num_shards: int, shard_rows: int) -> types.SimpleNamespace:
    """Return the attributes of a StreamingDataset that planning reads, without any files."""
    choose = np.floor(SHARES / SHARES.sum() * num_samples).astype(int)
    total_shards = len(SHARES) * num_shards
    return types.SimpleNamespace(
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
        shard_offset_per_stream=np.arange(len(SHARES)) * num_shards,
        shards_per_stream=np.full(len(SHARES), num_shards),
        samples_per_shard=np.full(total_shards, shard_rows),
        sample_offset_per_shard=np.arange(total_shards) * shard_rows,
        streams=[types.SimpleNamespace(choose=int(n)) for n in choose],
    )


def megatron(num_samples: int) -> tuple[Measured, np.ndarray]:
    """Build the two index arrays of a BlendedDataset with its compiled helper."""
    from megatron.core.datasets import helpers_cpp

    def build() -> np.ndarray:
        dataset = np.zeros(num_samples, np.int16)
        sample = np.zeros(num_samples, np.int64)
        helpers_cpp.build_blending_indices(dataset, sample, SHARES / SHARES.sum(), len(SHARES), num_samples, False)
        return dataset

    return timed(build)


def grain(num_samples: int) -> tuple[Measured, np.ndarray]:
    """Call `MapDataset.mix`, which computes the dataset of a sample only when the sample is requested."""
    from grain.python import MapDataset

    # The value of a sample tells its domain: domain k has the values from k * stride on.
    stride = 1 << 40
    sources = [MapDataset.range(k * stride, k * stride + num_samples) for k in range(len(SHARES))]
    measured, mixture = timed(lambda: MapDataset.mix(sources, weights=SHARES.tolist()))
    started = time.perf_counter()
    domain = np.fromiter((mixture[i] // stride for i in range(min(num_samples, GRAIN_SAMPLES))), np.int8)
    measured["expand_us"] = (time.perf_counter() - started) / len(domain) * 1e6
    return measured, domain


def huggingface(num_samples: int) -> tuple[Measured, np.ndarray]:
    """Call `interleave_datasets` on map-style datasets with probabilities, until the first one is exhausted."""
    from datasets import Dataset, disable_progress_bars, interleave_datasets

    disable_progress_bars()
    sizes = (SHARES / SHARES.sum() * num_samples).astype(int)
    sources = [Dataset.from_dict({"domain": np.full(n, k, np.int8)}) for k, n in enumerate(sizes)]
    shares = (SHARES / SHARES.sum()).tolist()
    measured, mixture = timed(lambda: interleave_datasets(sources, probabilities=shares, seed=0))
    return measured, np.asarray(mixture.with_format("numpy")["domain"][:], np.int8)


SYSTEMS: dict[str, Callable[[int], tuple[Measured, np.ndarray]]] = {
    "mixtera-hpc": mixtera_hpc,
    "mosaic": mosaic,
    "megatron": megatron,
    "grain": grain,
    "huggingface": huggingface,
}
PACKAGES = {"mosaic": "mosaicml-streaming", "megatron": "megatron-core", "grain": "grain", "huggingface": "datasets"}


def timed(build: Callable[[], Any]) -> tuple[Measured, Any]:
    """Measure a system that plans all samples before the first one is served."""
    bytes_before = peak_bytes()
    started = time.perf_counter()
    plan = build()
    seconds = time.perf_counter() - started
    return {"first_s": seconds, "plan_s": seconds, "bytes": peak_bytes() - bytes_before}, plan


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def deviations(domain: np.ndarray) -> Measured:
    """Return the largest deviations of sample counts from the shares, in sequences, over all domains.

    `prefix` is over all prefixes, `window` over all windows of `WINDOW` samples, `aligned` over every WINDOW-th of
    these.
    """
    largest = {"window": 0.0, "aligned": 0.0, "prefix": 0.0}
    for number, share in enumerate(SHARES / SHARES.sum()):
        count = np.concatenate([[0], np.cumsum(domain == number)])
        surplus = count - share * np.arange(len(domain) + 1)
        window = np.abs(surplus[WINDOW:] - surplus[:-WINDOW])
        for name, values in {"window": window, "aligned": window[::WINDOW], "prefix": np.abs(surplus)}.items():
            largest[name] = max(largest[name], float(values.max()))
    return largest


def main(name: str, num_samples: int) -> None:
    """Measure one system and print the result."""
    measured, domain = SYSTEMS[name](num_samples)
    version = importlib.metadata.version(PACKAGES[name]) if name in PACKAGES else "this repository"
    result = {"name": name, "version": version, "samples": len(domain), **measured, **deviations(domain)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
