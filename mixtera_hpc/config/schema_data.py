"""The keys that say what data there is, and how it is indexed."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DataConfig", "IndexConfig", "PropertyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PropertyConfig:
    """How one property is found in a row. In YAML a bare string is short for `{path: <string>, kind: category}`."""

    path: str | None = None
    """Dotted path inside the row (`meta.language`), or where the row comes from: `__path__`, `__name__`, `__stem__`,
    `__parent__`, `__folder__`, `__folder__.N`, `__partition__.KEY`, `__format__` (docs/formats.md)."""
    function: str | None = None
    """Instead of `path`: `package.module.function`, a function of yours from a list of documents to a value of each."""
    kind: Literal["category", "categories", "number"] = "category"
    """One value, several values, or a float64."""
    pattern: str | None = None
    """Regular expression searched for in the value; its first group (or all it matches) is the property, null without a match."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which files hold the samples, and where in a row the text and the properties are."""

    root: str = ""
    """Folder that all shard paths are relative to."""
    sets: dict[str, str] = field(default_factory=dict)
    """Instead of `root`, several data sets: name → folder. The name is the built-in property `dataset` of its samples."""
    include: list[str] = field(default_factory=lambda: ["**/*"])
    """Globs below `root`; files of unknown format are ignored by `**/*` and refused when a glob names them."""
    exclude: list[str] = field(default_factory=list)
    """Globs below `root` left out again."""
    format: str = "auto"
    """`auto` (by file name) or the name of a format."""
    text: str | None = "text"
    """Dotted path to the document; null where samples have none (`mixture.unit=samples`)."""
    properties: dict[str, PropertyConfig] = field(default_factory=dict)
    """Name → where it is found and of which kind."""
    parser: str | None = None
    """`package.module.function`, a function of yours from a row (a dict) to a dict of properties; `data.properties` then names
    paths in what it returns. It is imported by name and runs with your rights."""
    max_block_bytes: int = 4294967296
    """A row, or a compressed frame or file that can only be decoded as a whole, may decode to this many bytes; larger ones are
    refused when the index is built, before they fill the memory."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """A row that cannot be read ends the build, the first ten named; or it is left out, and counted per shard and reason in
    the index. `skip` leaves out the rest of a shard from where it is damaged on, too."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        """With `sets` there need not be a `root`."""
        if isinstance(value, dict) and value.get("sets") and value.get("root") == "???":
            return {key: part for key, part in value.items() if key != "root"}
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """The property index file and how it is built."""

    path: str
    """The HDF5 file."""
    paths: list[str] = field(default_factory=list)
    """Further indexes whose samples take part in a run; `dataset`, the name of the file, tells them apart."""
    generation: str | None = None
    """Fingerprint of an earlier state of a refreshed index; a run sees that state, and not the shards added since."""
    block_rows: int = 256
    """Rows of a block where a format is free to choose (JSONL, WebDataset, Megatron), the unit of I/O and shuffling."""
    seek_points: bool = True
    """Find seek points of long `.gz` members, and keep them in the folder `PATH.seek`: without them reading a block decodes its
    file from the start. Costs a second decompression while the index is built."""
    threads: int = 1
    """Threads that scan in every rank of a build; ranks gain more, where there are cores for them."""
