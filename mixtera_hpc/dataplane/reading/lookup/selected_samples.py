"""`SelectedSamples`: the samples that a run selects from its index, their domains, and which of them are dropped."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.mixture.domain_tree import domain_fractions
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_assignment import BucketGrid, DomainAssignment
from mixtera_hpc.core.domains import DomainRule
from mixtera_hpc.core.holdout import add_holdout_hashes, restrict_to_fractions, restrict_to_split
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.core.query.predicate import Entries, Predicate
from mixtera_hpc.dataplane.reading.lookup.block_samples import ReadBlocks
from mixtera_hpc.dataplane.reading.shared_index import IndexDescription, SharedTables
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.index.read.document_filter import DOCUMENT_NUMBER, NamedDocuments, add_document_numbers
from mixtera_hpc.index.read.joined_samples import open_samples

__all__ = ["SelectedSamples", "select_samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedSamples:
    """The selected samples of a run. Make it with `select_samples`."""

    index: IndexDescription
    tables: SharedTables
    domain_rule: DomainRule
    """Gives every selected sample its domain, dropped or not."""
    drop_filter: Predicate | None
    """Matches the samples that are served after drops; None when nothing is dropped."""
    in_tokens: bool
    """True if streams count tokens, False if they count samples."""

    def make_block_reader(self) -> ReadBlocks:
        """Return a function that reads the sample columns of some blocks."""
        # Nothing is opened yet: many ranks never read some of several indexes.
        reader = open_samples(self.index.sample_sources)
        blocks = self.tables.blocks
        holdout_keys = self.tables.holdout_keys

        # Only the columns that this run evaluates are read and decompressed.
        numbers = self.domain_rule.predicate.numbers | self.domain_rule.assignment.numbers
        if self.drop_filter is not None:
            numbers |= self.drop_filter.numbers
        sizes = {"length", "tokens"} if self.in_tokens else {"length"}
        columns = {*sizes, "combo", *(f"numbers/{name}" for name in numbers)}

        def read_blocks(chosen: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
            first_samples = blocks.first_sample[chosen].tolist()
            samples = reader.read_many(first_samples, blocks.rows[chosen].tolist(), sizes if only_sizes else columns)
            if only_sizes:
                return samples
            if DOCUMENT_NUMBER in numbers:
                samples = add_document_numbers(samples, blocks, chosen)
            if holdout_keys is not None:
                samples = add_holdout_hashes(samples, holdout_keys, blocks, chosen)
            return samples

        return read_blocks

    def domain_of(self, columns: SampleColumns) -> NDArray[np.int32]:
        """Return the domain of every sample, dropped or not, or -1 for none; shape (rows,)."""
        return self.domain_rule.domain_of(self.tables.combos, columns)

    def is_not_dropped(self, columns: SampleColumns) -> NDArray[np.bool_]:
        """Return which samples are still served after drops; shape (rows,)."""
        if self.drop_filter is None:
            return np.ones(len(columns.combo), np.bool_)
        entries = Entries.of_samples(self.tables.combos, columns.combo, columns.numbers)
        return self.drop_filter.evaluate(entries).must_match


def select_samples(
    config: Config, index: IndexDescription, tables: SharedTables, subset: SampleSubset, *, in_tokens: bool
) -> SelectedSamples:
    """Restore rank 0's selection from the shared index, without the counts that only a query prints."""
    documents = NamedDocuments(index.shard_paths, tables.blocks)
    properties = {prop.name: prop for prop in index.properties}
    holdout_fraction = config.query.holdout.fraction

    def parse(text: str) -> Predicate:
        predicate = parse_predicate(text, properties, documents.compile)
        if holdout_fraction:
            predicate = restrict_to_split(predicate, holdout_fraction, subset.split)
        return predicate

    predicate = parse(index.where)
    grid = BucketGrid(cuts={name: tuple(cuts) for name, cuts in index.number_cuts.items()})
    assignment = DomainAssignment(grid=grid, domain=tables.assigned)
    if subset.split == "train":
        fractions = domain_fractions(config.mixture, len(index.domain_names))
        if fractions is not None:
            predicate = restrict_to_fractions(predicate, assignment, fractions, holdout_fraction)

    return SelectedSamples(
        index=index,
        tables=tables,
        domain_rule=DomainRule(predicate=predicate, assignment=assignment),
        drop_filter=parse(index.where_after_drops) if subset.drop else None,
        in_tokens=in_tokens,
    )
