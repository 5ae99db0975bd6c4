"""Settings of the groups `data` and `index`: which files hold the samples, and how they are indexed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mixtera_hpc.config.schema.composed_default import composed_from

__all__ = ["DataConfig", "DataSetConfig", "DataSetKeys", "IndexConfig", "PropertyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PropertyConfig:
    """Source of one property of a sample. A bare string is short for `{path: STRING, kind: category}`."""

    path: str | None = None
    """Dotted path inside the row (`meta.language`), or a value taken from the location of the row: `__path__`,
    `__name__`, `__stem__`, `__parent__`, `__folder__`, `__folder__.N`, `__partition__.KEY`, `__format__`
    (docs/formats.md)."""
    function: str | None = None
    """Used instead of `path`: the import path `package.module.function` of your function from a list of documents to a
    list with one value for each of them."""
    over: Literal["documents", "rows"] = "documents"
    """Argument of the function: a list of texts, or of whole rows (dicts)."""
    number: str | None = None
    """Used instead of `path`: the name of a number property. The value is the bucket that it lies in."""
    buckets: list[float] | None = None
    """Ascending bounds of the buckets of `number`: [0, 0.3, 0.7, 1] gives the values `[0,0.3)`, `[0.3,0.7)` and
    `[0.7,1]`, and null outside."""
    kind: Literal["category", "categories", "number"] = "category"
    """`category`: one string per sample. `categories`: several strings per sample. `number`: one float64 per sample."""
    pattern: str | None = None
    """Regular expression that is searched for in the value. The property is its first group, or the whole match if it
    has no group, and null if there is no match."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        """Expand a bare string into the mapping that it is short for."""
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetKeys:
    """The keys that describe one data set: its files, and where a row has its text and its properties."""

    root: str = ""
    """Folder that all shard paths are relative to. `index build` and `index refresh` need it, unless `data.sets` is
    given. A run without it uses the folder that the index was built from; see `index.trusted_roots`."""
    include: list[str] = field(default_factory=lambda: ["**/*"])
    """Glob patterns of the shards, relative to the root; `{a,b}` stands for either a or b. Each must match a file below
    some root. `**/*` ignores files of unknown format. A pattern that names such a file explicitly is refused."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to leave out again, relative to the root."""
    format: str = "auto"
    """Name of the format of all shards, or `auto` to take the format from each file name (docs/formats.md)."""
    text: str | None = "text"
    """Dotted path to the document inside a row. Or several fields in a template, `"{title}: {body}"`. Or
    `function:package.module.function`, your function from a list of rows (dicts) to a list of texts. Or `chat:PATH`,
    the path of a list of messages, which the chat template of the tokenizer renders. Null for samples without text,
    which need `mixture.unit=samples`."""
    properties: dict[str, PropertyConfig] = field(default_factory=dict)
    """Properties of every sample: name → where its value comes from, for example `{language: meta.lang}`."""
    parser: str | None = None
    """Import path `package.module.function` of your function from a row (a dict) to a dict. The paths in
    `data.properties` then refer to the dict that it returns. The function runs with your permissions."""
    max_block_bytes: int = 4294967296
    """Largest decoded size, in bytes, of a row and of a compressed frame or file that can only be decoded as a whole.
    Builds and runs refuse larger ones before they take the memory, and an index file whose tables are larger. At
    least 65536."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """Action of an index build for rows that cannot be read. `fail`: end the build and name the first ten. `skip`:
    leave them out and record their number per shard and reason in the index. If a shard is damaged, `skip` leaves out
    the rest of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetConfig(DataSetKeys):
    """One of several data sets. A bare string is short for `{root: STRING}`.

    A key that a set does not give is that of `data`. Its properties are added to those of `data.properties`.
    """

    @classmethod
    def from_short(cls, value: Any) -> Any:
        """Expand a bare string into the mapping that it is short for."""
        return {"root": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(DataSetKeys):
    """Files that hold the samples, and places of text and properties in a row.

    The keys describe a single data set, or the defaults of all of `data.sets`.
    """

    sets: dict[str, DataSetConfig] = field(default_factory=dict)
    """Several data sets in one index: name → a folder, or a mapping with any other key of `data`, for example `{web:
    /a, code: {root: /b, text: content}}`. The name becomes the built-in property `dataset` of the samples."""

    transform: str | None = None
    """With `mixture.unit=samples`: import path `package.module.function` of your function from a raw row and a
    `ServedSample` to what the trainer gets, for example a decoded image and its text. It runs where samples are
    read."""

    cache_bytes: int = 2147483648
    """Memory of each node for rows of files that can only be decoded in large units (compressed files, Parquet), shared
    by the processes that read. If it is too small, units are decoded several times. If several processes read, half of
    it is for decoded units that they share. Half of the part of a process may hold mapped pages of plain files. The
    order of the samples does not depend on it."""
    max_amplification: float = 64.0
    """Bytes decoded for every byte served, in files that can only be decoded in large units. `plan`, `submit` and
    every run refuse a job that would need more."""
    materialize: Literal["auto", "always", "never"] = "auto"
    """The store that `index build` writes beside the index for runs to read: token ids, or with `mixture.unit=samples`
    the rows of compressed JSON lines, each domain in frames of its own. `auto`: a store if some files are compressed
    JSON lines, of which a single row cannot be read. `always`: also token ids of other files. `never`: no store is
    written or extended, and runs read no stored rows. `index refresh` extends a store that exists."""
    tokens: str = "auto"
    """Token ids that `index build` or `mixtera-hpc tokenize` has written. `auto`: those beside the index, if there are
    any. `off`: none, documents are tokenized while a run reads. Or the folder that holds them. Cost only: the batches
    are the same."""

    @classmethod
    def complete(cls, plain: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give every data set the keys that only `data` has, and the properties that only `data` has."""
        sets = plain.get("sets")
        if not isinstance(sets, Mapping):
            return plain
        defaults = {
            key: value
            for key, value in plain.items()
            if key not in ("sets", "transform", "materialize", "tokens", "cache_bytes", "max_amplification")
        }
        return {**plain, "sets": {name: _with_defaults(own, defaults) for name, own in sets.items()}}

    def named_sets(self) -> dict[str, DataSetKeys]:
        """Return every data set by name, sorted; a single one without a name is called ''."""
        return dict(sorted(self.sets.items())) if self.sets else {"": self}

    def largest_block_bytes(self) -> int:
        """Return the largest `max_block_bytes` of all data sets."""
        return max(data_set.max_block_bytes for data_set in self.named_sets().values())

    def roots(self) -> dict[str, str]:
        """Return the folder of every named data set; empty where only `data.root` is used."""
        return {name: data_set.root for name, data_set in self.sets.items()}


def _with_defaults(own: Any, defaults: Mapping[str, Any]) -> Any:
    """Return the keys of a data set with `defaults` for those that it lacks."""
    own = DataSetConfig.from_short(own)
    # Values of another type are reported when they are converted.
    if not isinstance(own, Mapping):
        return own
    properties = [source.get("properties") for source in (defaults, own)]
    merged = {**defaults, **own}
    if all(isinstance(part, Mapping) for part in properties):
        merged["properties"] = {**defaults["properties"], **own["properties"]}
    return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """The property index files, and how an index is built."""

    path: str = composed_from("${data.root}/index.h5")
    """The HDF5 file that `index build`, `refresh` and `derive` write, on a file system that all nodes share."""
    paths: list[str] = field(default_factory=list)
    """The indexes that runs, `plan` and `query` read, in this order. Empty takes `index.path`. Several are joined: the
    property `dataset` of their samples is the name of the file, without its ending."""
    generations: list[str] = field(default_factory=list)
    """For each index that is read, in the order of `index.paths`, the fingerprint of an earlier state, or its first
    characters. The run sees that state, without the shards added by a later refresh. An empty string takes the newest
    state of that index, an empty list the newest state of all."""
    trusted_roots: list[str] = field(default_factory=list)
    """Used if `data.root` is empty: folders whose data your jobs may read. The data root stored in an index of another
    user is accepted only if it is one of these folders or below one. The one stored in an index of your own is always
    accepted."""
    block_rows: int = 256
    """Rows per block for formats that leave the choice (JSONL, WebDataset, Megatron). A block is the unit of I/O and of
    shuffling."""
    seek_points: bool = True
    """Find seek points of long `.gz` members during the build and store them in the folder `PATH.seek`. This costs a
    second decompression. Without seek points, reading a block decodes its file from the start."""
    threads: int = 1
    """Threads that scan shards in each rank of a build."""

    @property
    def paths_to_read(self) -> list[str]:
        """Return the indexes that a run reads, in order."""
        return self.paths or [self.path]
