"""Sizes of the streams of the domains, and the order of their samples."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import Config, DataPlaneConfig
from mixtera_hpc.core.index_tables import BlockTable, DomainTable
from mixtera_hpc.core.order import EpochOrder, ShuffleOrder
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["ShardFacts", "StreamLayout"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """Facts about every shard that the sizes and the order of streams depend on; shape (num_shards,) each."""

    expansion: NDArray[np.float64]
    """Decoded bytes per byte that the index counts in the blocks of the shard."""
    is_chat: NDArray[np.bool_]
    """Mask of the shards whose rows are conversations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLayout:
    """Sizes of the streams and the order of their samples; the same on every rank."""

    table: DomainTable
    blocks: BlockTable
    expansion: NDArray[np.float64]
    """Decoded bytes per byte that the index counts in the blocks of each shard; shape (num_shards,)."""
    order: ShuffleOrder
    num_specials: int
    """Special tokens added to every document, but not to conversations."""
    chat_blocks: NDArray[np.bool_] | None
    """Mask of the blocks of the index that hold conversations; None if no block does."""
    in_tokens: bool
    """True if items are tokens; otherwise they are samples."""

    @classmethod
    def of_config(
        cls,
        config: Config,
        table: DomainTable,
        blocks: BlockTable,
        shards: ShardFacts,
        tokenizer: Tokenizer | None,
    ) -> "StreamLayout":
        """Return the layout of the streams of the domains in `table`."""
        plane = config.dataplane
        in_tokens = config.mixture.unit == "tokens"
        return cls(
            table=table,
            blocks=blocks,
            expansion=shards.expansion,
            order=ShuffleOrder(seed=plane.seed, shuffle=plane.shuffle, window_bytes=plane.window_bytes),
            num_specials=_num_specials(plane, tokenizer) if in_tokens else 0,
            chat_blocks=_chat_blocks(shards, blocks) if in_tokens else None,
            in_tokens=in_tokens,
        )

    def entries(self, domain: int) -> slice:
        """Return where the blocks of `domain` are in the table."""
        return slice(int(self.table.indptr[domain]), int(self.table.indptr[domain + 1]))

    def only_domains(self) -> NDArray[np.int32]:
        """Return the domain of the blocks whose samples are all in the stream of one domain, -1 for others."""
        domains = np.full(len(self.blocks), -1, np.int32)
        is_whole = self.table.rows == self.blocks.rows[self.table.block]
        of_entry = np.repeat(np.arange(self.table.num_domains, dtype=np.int32), np.diff(self.table.indptr))
        domains[self.table.block[is_whole]] = of_entry[is_whole]
        return domains

    def added_tokens(self, blocks: NDArray[np.int32]) -> Ints:
        """Return the special tokens that are added to each document of these blocks; shape (len(blocks),)."""
        if self.chat_blocks is None:
            return np.full(len(blocks), self.num_specials)
        # A chat template writes all special tokens itself.
        return np.where(self.chat_blocks[blocks], 0, self.num_specials)

    def sizes(self, domain: int) -> Ints:
        """Return the items of `domain` in each of its blocks; shape (blocks of the domain,)."""
        entries = self.entries(domain)
        rows = self.table.rows[entries].astype(np.int64)
        if not self.in_tokens:
            return rows
        return self.table.tokens[entries] + self.added_tokens(self.table.block[entries]) * rows

    def block_bytes(self, domain: int) -> Ints:
        """Return the decoded bytes of each block of `domain`, other domains included; shape (blocks of the domain,)."""
        block = self.table.block[self.entries(domain)]
        decoded: Ints = (self.blocks.length[block] * self.expansion[self.blocks.shard[block]]).astype(np.int64)
        return decoded

    def epoch_order(self, domain: int, epoch: int) -> EpochOrder:
        """Order the blocks of `domain` for `epoch`, in O(blocks) time."""
        blocks = self.table.block[self.entries(domain)]
        return self.order.epoch(epoch, blocks, self.sizes(domain), self.block_bytes(domain))

    def epoch_items(self) -> Ints:
        """Return the items of one epoch of every domain; shape (K,)."""
        if self.chat_blocks is not None:
            return np.array([self.sizes(domain).sum() for domain in range(self.table.num_domains)], np.int64)
        rows, tokens = self.table.totals()
        # Every document is followed by its special tokens.
        return tokens + self.num_specials * rows if self.in_tokens else rows


def _chat_blocks(shards: ShardFacts, blocks: BlockTable) -> NDArray[np.bool_] | None:
    """Return which blocks hold conversations; None if no block does."""
    return shards.is_chat[blocks.shard] if shards.is_chat.any() else None


def _num_specials(plane: DataPlaneConfig, tokenizer: Tokenizer | None) -> int:
    """Return how many special tokens every document gets."""
    if tokenizer is None:
        return int(plane.add_eos)
    return len(tokenizer.added.before) + len(tokenizer.added.after)
