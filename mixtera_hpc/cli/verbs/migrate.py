"""`mixtera-hpc migrate`: write an experiment with the data sets and weights of another loader."""

import argparse
from pathlib import Path

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "loader",
        choices=("megatron", "huggingface", "mosaic", "energon"),
        help="where the data come from",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="megatron: the words of --data-path, or one file of --data-args-path or --per-split-data-args-path; "
        "huggingface: folders of save_to_disk, each after its probability; mosaic: a YAML file with streams, or "
        "folders of MDS shards, also after their weights; energon: a metadataset YAML. And overrides KEY=VALUE, which "
        "are written into the experiment",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file to write, CONF/experiment/NAME.yaml"
    )
    parser.epilog = """\
The data stay where they are. The commands that build the index and print the plan are printed at the end.

Examples:
  mixtera-hpc migrate megatron 30 /data/web_text_document 70 /data/code_text_document \\
      dataplane.tokenizer=tokenizer.json --out my_conf/experiment/blend.yaml
  mixtera-hpc migrate huggingface 0.8 /data/web 0.2 /data/code --out my_conf/experiment/blend.yaml
  mixtera-hpc migrate mosaic train.yaml --out my_conf/experiment/blend.yaml
  mixtera-hpc migrate energon metadataset.yaml --out my_conf/experiment/blend.yaml"""


def run(args: argparse.Namespace) -> int:
    """Write the experiment and print its proportions and the next commands."""
    # Imported here because the checks of a configuration take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.migrate_answer import migrate

    migrate(args)
    return 0
