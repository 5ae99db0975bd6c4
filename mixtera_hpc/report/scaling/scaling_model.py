"""Model the cost of the data plane on many nodes: planning, broadcast, reduction and metadata, per step.

Sizes and message counts follow from the code and are checked against real ranks (`python -m bench scaling`). CPU times
and the time of a step come from a recorded run. Latency, bandwidth and metadata rate are stated constants of the
cluster (`cluster.network_latency_us`, `cluster.network_gb_per_s`, `cluster.metadata_ops_per_s`): a machine with more
ranks than cores cannot measure them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtera_hpc.config.schema import ClusterConfig
from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.summary import summarize_run
from mixtera_hpc.report.timing.stage_limits import stage_limits

__all__ = [
    "AGREEMENT_BYTES",
    "ModelConstants",
    "ModelRow",
    "assumptions",
    "broadcast_bytes",
    "model_constants",
    "model_scaling",
    "reduction_bytes",
]

AGREEMENT_BYTES = 48
"""The reduction in which ranks agree on batches: 6 integers."""

RANK_TIMES_CPU_S = 4e-9
"""CPU time of rank 0 per step and rank, for the times of all ranks that the reduction carries."""

DOUBLING_CPU_S = 2.1e-4
"""CPU time of a rank per step for each doubling of the ranks, measured with messages over TCP: an upper bound where the
network adapter does this work."""

START_FILES = 7
"""Opens and `stat` calls of the data plane on a rank at the start; rank 0 makes 36."""

IMPORT_FILES = 31_600
"""Opens and `stat` calls of Python's imports on a rank, if the environment is on the shared file system."""

HEARTBEAT_S = 5.0
RANKS_PER_HEARTBEAT_S = 200
"""A rank writes its heartbeat every 5 s; in large jobs every N / 200 s, so that the file system gets 200 per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConstants:
    """The inputs of the model."""

    num_domains: int
    num_scalars: int
    chunk_steps: int
    prefetch_batches: int
    ranks_per_node: int
    base_ranks: int
    """Ranks of the recorded run."""
    step_s: float
    """Time of a step of the recorded run."""
    plan_s: float
    """CPU time of rank 0 for planning a chunk."""
    latency_s: float
    bytes_per_s: float
    """Bandwidth of one rank."""
    metadata_per_s: float
    """Metadata operations that the shared file system answers per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """The data plane on a number of nodes. Times are per step unless stated otherwise."""

    nodes: int
    ranks: int
    broadcast_bytes: int
    """Size of a plan; one broadcast per chunk."""
    broadcast_messages: int
    """Messages of a broadcast, over all ranks."""
    broadcast_s: float
    """Time until the last rank has a plan, per chunk."""
    reduction_bytes: int
    """Size of the reduction of a step."""
    reduction_messages: int
    """Messages of a reduction, over all ranks."""
    reduction_s: float
    agreement_s: float
    """Time of an agreement on batches, of which there is one per `prefetch_batches` - 1 steps."""
    root_cpu_s: float
    """CPU time of rank 0 for plans, messages and the times of all ranks, per step."""
    exposed_s: float
    """Time that a step takes longer than in the recorded run."""
    efficiency: float
    """Time of a step of the recorded run divided by that of a step here, with the same work per rank."""
    start_s: float
    """Metadata operations of the data plane at the start, at the rate of the file system."""
    import_s: float
    """The same for Python's imports, if the environment is on the shared file system."""
    heartbeats_per_s: float


def broadcast_bytes(num_domains: int) -> int:
    """Return the size of a plan: 3 integers per domain and 5 more."""
    return 8 * (5 + 3 * num_domains)


def reduction_bytes(num_domains: int, num_ranks: int, num_scalars: int = 0) -> int:
    """Return the size of the reduction of a step: 8 bytes per rank, 32 per domain, 24 per domain and scalar, flags."""
    return 8 * (num_ranks + (4 + 3 * num_scalars) * num_domains + 7)


def model_constants(metrics: RunMetrics) -> ModelConstants:
    """Take the constants of the model from a recorded run and its cluster."""
    config = metrics.config
    dataplane: Mapping[str, Any] = config.get("dataplane", {})
    cluster: Mapping[str, Any] = config.get("cluster", {})
    performance = summarize_run(metrics).performance
    chunk_steps = max(int(dataplane.get("chunk_steps") or 1), 1)
    planning = next((limit.seconds for limit in stage_limits(metrics) if limit.stage == "planning"), 0.0)
    ranks = performance.num_ranks
    job: Mapping[str, Any] = config.get("job", {})
    return ModelConstants(
        num_domains=len(metrics.domains),
        num_scalars=len(dataplane.get("scalars") or {}),
        chunk_steps=chunk_steps,
        prefetch_batches=max(int(dataplane.get("prefetch_batches") or 2), 2),
        ranks_per_node=int(job.get("ranks_per_node") or cluster.get("ranks_per_node") or 1),
        base_ranks=ranks,
        step_s=performance.step_p50_s,
        plan_s=performance.plan_p50_s or planning * chunk_steps,
        latency_s=float(cluster.get("network_latency_us", ClusterConfig().network_latency_us)) * 1e-6,
        bytes_per_s=float(cluster.get("network_gb_per_s", ClusterConfig().network_gb_per_s)) * 1e9,
        metadata_per_s=float(cluster.get("metadata_ops_per_s", ClusterConfig().metadata_ops_per_s)),
    )


def model_scaling(constants: ModelConstants, max_nodes: int) -> list[ModelRow]:
    """Return the model for 1, 2, 4, … nodes up to `max_nodes`, with the same work per rank."""
    counts = [2**i for i in range(max_nodes.bit_length()) if 2**i < max_nodes]
    return [_row(constants, nodes) for nodes in (*counts, max_nodes)]


def assumptions(constants: ModelConstants) -> Sequence[str]:
    """Return the assumptions of the model as text."""
    return (
        f"Every rank does the work of the recorded run on {constants.base_ranks} ranks: {constants.step_s:.3g} s per "
        "step, with as much reading. The trainer's own communication and the bandwidth of storage are not modelled.",
        f"Network: {constants.latency_s * 1e6:g} µs per message and {constants.bytes_per_s / 1e9:g} GB/s per rank, "
        "from cluster.network_latency_us and cluster.network_gb_per_s; not measured here.",
        "A broadcast is a binomial tree: ⌈log2 N⌉ messages after each other. A reduction scatters and gathers: "
        "2 ⌈log2 N⌉ messages per rank, and twice its bytes.",
        f"Rank 0 plans a chunk of {constants.chunk_steps} steps in {constants.plan_s * 1e6:.0f} µs (recorded). Per "
        f"step, the times of all ranks take it {RANK_TIMES_CPU_S * 1e9:g} ns per rank, and messages take every rank "
        f"{DOUBLING_CPU_S * 1e6:.0f} µs for each doubling of the ranks (measured over TCP, an upper bound).",
        "Broadcasts overlap with a chunk, reductions and agreements with a step; what is longer delays the step.",
        f"The shared file system answers {constants.metadata_per_s:,.0f} metadata operations per second "
        "(cluster.metadata_ops_per_s).",
    )


def _row(constants: ModelConstants, nodes: int) -> ModelRow:
    ranks = nodes * constants.ranks_per_node
    depth = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    plan_bytes = broadcast_bytes(constants.num_domains)
    step_bytes = reduction_bytes(constants.num_domains, ranks, constants.num_scalars)

    broadcast_s = depth * (constants.latency_s + plan_bytes / constants.bytes_per_s)
    reduction_s = _reduction_s(constants, depth, step_bytes)
    agreement_s = _reduction_s(constants, depth, AGREEMENT_BYTES)
    message_cpu_s = depth * DOUBLING_CPU_S
    root_cpu_s = constants.plan_s / constants.chunk_steps + ranks * RANK_TIMES_CPU_S + message_cpu_s

    # Only what does not fit beside the trainer delays it; the CPU time of the recorded run is part of its step.
    chunk_s = constants.chunk_steps * constants.step_s
    exposed_s = max(constants.plan_s + broadcast_s - chunk_s, 0.0) / constants.chunk_steps
    exposed_s += max(reduction_s - constants.step_s, 0.0)
    exposed_s += max(agreement_s - constants.step_s, 0.0) / (constants.prefetch_batches - 1)
    base_depth = math.ceil(math.log2(constants.base_ranks))
    exposed_s += max(ranks - constants.base_ranks, 0) * RANK_TIMES_CPU_S
    exposed_s += max(depth - base_depth, 0) * DOUBLING_CPU_S
    return ModelRow(
        nodes=nodes,
        ranks=ranks,
        broadcast_bytes=plan_bytes,
        broadcast_messages=max(ranks - 1, 0),
        broadcast_s=broadcast_s,
        reduction_bytes=step_bytes,
        reduction_messages=2 * depth * ranks,
        reduction_s=reduction_s,
        agreement_s=agreement_s,
        root_cpu_s=root_cpu_s,
        exposed_s=exposed_s,
        efficiency=constants.step_s / (constants.step_s + exposed_s),
        start_s=ranks * START_FILES / constants.metadata_per_s,
        import_s=ranks * IMPORT_FILES / constants.metadata_per_s,
        heartbeats_per_s=ranks / max(HEARTBEAT_S, ranks / RANKS_PER_HEARTBEAT_S),
    )


def _reduction_s(constants: ModelConstants, depth: int, num_bytes: int) -> float:
    if depth == 0:
        return 0.0
    return 2 * (depth * constants.latency_s + num_bytes / constants.bytes_per_s)
