"""Offer the sizes of samples as numbers: `tokens`, and `bytes` of the row on disk or of the document.

Every index has them without storing them again. Their zones are unknown, so a query that compares a size reads the
column of all samples that its categories leave.
"""

from dataclasses import replace

import numpy as np

from mixtera_hpc.core.index_tables import IndexTables, Zones
from mixtera_hpc.core.properties import Kind, Property
from mixtera_hpc.index.layout import SIZE_NUMBERS

__all__ = ["add_size_numbers"]


def add_size_numbers(tables: IndexTables) -> IndexTables:
    """Return `tables` with the sizes of samples as number properties; `tokens` only if they were counted."""
    names = [name for name in SIZE_NUMBERS if tables.has_tokens or name != "tokens"]
    num_blocks = len(tables.blocks)
    # Only `bytes` may be null: the rows of some formats have no byte range.
    zones = {
        name: Zones(
            low=np.zeros(num_blocks),
            high=np.full(num_blocks, np.inf),
            has_null=np.full(num_blocks, name == "bytes"),
        )
        for name in names
    }
    properties = {name: Property(name=name, kind=Kind.NUMBER) for name in names}
    return replace(
        tables,
        properties={**tables.properties, **properties},
        blocks=replace(tables.blocks, zones={**tables.blocks.zones, **zones}),
    )
