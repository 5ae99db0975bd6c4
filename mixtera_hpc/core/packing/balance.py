"""The order of positions that balances ranks: any equal parts of a group of positions have nearly equal cost.

With attention inside documents, a sequence costs the sum of the squares of its document lengths. A group of sequences
is divided into equal numbers of sequences with nearly equal cost, those parts again, and so on, by the prime factors of
the group. Each division gives the costliest sequence to the cheapest part that has room (longest processing time first,
Graham 1969). Ranks take neighbouring positions, so the order balances every number of ranks, and does not depend on it.
Price: about 20 numpy calls per position of a group, for all groups of a read together.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["attention_costs", "balanced_order", "max_over_mean"]

Ints = NDArray[np.int64]


def attention_costs(lengths: Ints, sequence: Ints, num_sequences: int) -> Ints:
    """Return the sum of the squares of document lengths of every sequence; shape (num_sequences,).

    Args:
        lengths: tokens of every document inside its sequence; shape (n,).
        sequence: number of the sequence of every document; shape (n,).
        num_sequences: sequences in all.
    """
    costs = np.zeros(num_sequences, np.int64)
    np.add.at(costs, sequence, lengths * lengths)
    return costs


def balanced_order(costs: Ints) -> NDArray[np.intp]:
    """Return which sequence of its group takes each position; shape (num_groups, group_size), as `costs`."""
    num_groups, group_size = costs.shape
    order = np.tile(np.arange(group_size), (num_groups, 1))
    part_size = group_size
    for num_parts in _prime_factors(group_size):
        chosen = _divide(np.take_along_axis(costs, order, axis=1).reshape(-1, part_size), num_parts)
        order = np.take_along_axis(order.reshape(-1, part_size), chosen, axis=1).reshape(num_groups, group_size)
        part_size //= num_parts
    return order


def max_over_mean(costs: NDArray[Any], num_ranks: int) -> float:
    """Return the largest cost of a rank divided by the mean, averaged over steps.

    Args:
        costs: cost of the sequence at every position; shape (num_steps, global_batch_size).
        num_ranks: ranks that share each step.
    """
    by_rank = costs.reshape(len(costs), num_ranks, -1).sum(axis=2)
    return float((by_rank.max(axis=1) / np.maximum(by_rank.mean(axis=1), 1)).mean())


def _divide(costs: Ints, num_parts: int) -> NDArray[np.intp]:
    """Divide every row into parts of equal size and nearly equal cost; return its columns, part after part."""
    num_rows, num_columns = costs.shape
    part_size = num_columns // num_parts
    rows = np.arange(num_rows)
    sums = np.zeros((num_rows, num_parts), np.int64)
    counts = np.zeros((num_rows, num_parts), np.intp)
    divided = np.empty((num_rows, num_columns), np.intp)

    full = np.iinfo(np.int64).max
    # Equal costs keep the order of the positions, so that every machine computes the same.
    by_cost = np.argsort(-costs, axis=1, kind="stable")
    for column in by_cost.T:
        part = np.where(counts < part_size, sums, full).argmin(axis=1)
        divided[rows, part * part_size + counts[rows, part]] = column
        sums[rows, part] += costs[rows, column]
        counts[rows, part] += 1
    return divided


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors of `number`, the largest first.

    So the last parts are halves of halves, and an equal part of the group that has another size consists of whole ones.
    """
    factors: list[int] = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]
