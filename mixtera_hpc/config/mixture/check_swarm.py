"""Check the settings of a swarm that need neither an index nor proxies."""

import math

from mixtera_hpc.config.check_numbers import all_at_least
from mixtera_hpc.config.schema import SwarmConfig

__all__ = ["swarm_problems"]

SUM_TOLERANCE = 1e-6


def swarm_problems(swarm: SwarmConfig) -> list[str]:
    """Return everything wrong with the group `swarm`, one sentence each."""
    problems = all_at_least("swarm", swarm, 0, ("num_proxies", "seed", "penalty"))
    problems += all_at_least("swarm", swarm, 1, ("target_tokens",))
    for name in ("temperature", "concentration"):
        value = getattr(swarm, name)
        if not 0 < value < math.inf:
            problems.append(f"swarm.{name} is {value}, expected a number above 0.")
    if not 0 <= swarm.min_share < 1:
        problems.append(f"swarm.min_share is {swarm.min_share}, expected a share of at least 0 and below 1.")
    if not all(0 < share <= 1 for share in swarm.phases) or abs(sum(swarm.phases) - 1) > SUM_TOLERANCE:
        problems.append(
            f"swarm.phases is {swarm.phases}, expected shares of the run above 0 that sum to 1, such as [0.8, 0.2]."
        )
    if not math.isfinite(swarm.penalty):
        problems.append(f"swarm.penalty is {swarm.penalty}, expected a finite number.")
    wrong = {name: weight for name, weight in swarm.objective.items() if not 0 <= weight < math.inf}
    problems += [f"swarm.objective.{name} is {weight}, expected at least 0." for name, weight in wrong.items()]
    if swarm.objective and not any(swarm.objective.values()):
        problems.append("swarm.objective has only weights of 0. Give at least one metric a weight.")
    return problems
