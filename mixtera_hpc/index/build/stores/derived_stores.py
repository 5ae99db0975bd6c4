"""Let the stores of an index belong to the one that was derived from it: its rows are the same."""

from pathlib import Path

import msgspec

from mixtera_hpc.config.schema import Config
from mixtera_hpc.index.row_store.row_files import RowStoreFiles
from mixtera_hpc.index.token_store.store_files import OFF, StoreFiles, store_folder

__all__ = ["keep_stores"]


def keep_stores(config: Config, index: Path, before: str, now: str) -> None:
    """Write the new fingerprint into complete stores of an index.

    The order of their content stays that of the older properties, which only decides how long the reads of a domain
    are.

    Args:
        config: names the folder of the token store.
        index: the index.
        before: fingerprint that the stores were made for.
        now: fingerprint of the derived index.
    """
    if config.data.tokens != OFF:
        tokens = StoreFiles(store_folder(config, str(index)))
        header = tokens.read_header()
        if header is not None and header.complete and header.index == before:
            tokens.write_header(msgspec.structs.replace(header, index=now, generations=[now]))
    rows = RowStoreFiles.of_index(index)
    row_header = rows.read_header()
    if row_header is not None and row_header.complete and row_header.index == before:
        rows.write_header(msgspec.structs.replace(row_header, index=now, generations=[now]))
