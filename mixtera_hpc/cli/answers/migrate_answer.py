"""Read the blend of another loader, write the experiment, and print its proportions and the next commands."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from mixtera_hpc.cli.migration.blend import Blend
from mixtera_hpc.cli.migration.energon_metadataset import read_energon_metadataset
from mixtera_hpc.cli.migration.experiment_file import ExperimentFile, split_overrides
from mixtera_hpc.cli.migration.huggingface_folders import read_huggingface_folders
from mixtera_hpc.cli.migration.megatron_blend import read_megatron_blend
from mixtera_hpc.cli.migration.mosaic_streams import read_mosaic_streams
from mixtera_hpc.errors import pluralize

__all__ = ["migrate"]

_READERS: Mapping[str, Callable[[Sequence[str]], Blend]] = {
    "megatron": read_megatron_blend,
    "huggingface": read_huggingface_folders,
    "mosaic": read_mosaic_streams,
    "energon": read_energon_metadataset,
}


def migrate(args: argparse.Namespace) -> None:
    """Write the experiment of a blend.

    Raises:
        ConfigError: the source or the path of the experiment cannot be used; nothing is written.
    """
    experiment = ExperimentFile(args.out)
    sources, overrides = split_overrides(args.sources)
    blend = _READERS[args.loader](sources)
    experiment.write(blend, args.loader, overrides)
    print(f"{args.out}: {pluralize(len(blend.entries), 'data set')}; weights count {blend.counts}.")
    total = sum(entry.weight or 0 for entry in blend.entries)
    for entry in blend.entries:
        share = "by size" if entry.weight is None else f"{entry.weight / total:.4%}"
        print(f"  {share:>9}  {entry.name}  {entry.root}")
    for note in blend.notes:
        print(f"Note: {note}")
    print("Next:")
    for command in experiment.next_commands():
        print(f"  {command}")
