"""`mixtera-hpc validate`: every experiment on every cluster, every problem listed."""

from argparse import ArgumentParser, Namespace

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: Namespace) -> int:
    from mixtera_hpc.launch.check import check_all_pairs

    result = check_all_pairs()
    if args.json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(result)))
        return 2 if result.misfits else 0
    for misfit in result.misfits:
        print(f"experiment={misfit.experiment or '(none)'} cluster={misfit.cluster}\n  {misfit.problem}")
    if result.unset:
        print(f"Not set here, a placeholder stood in: {', '.join(result.unset)}")
    pairs = (len(result.experiments) + 1) * len(result.clusters)
    print(f"{pairs - len(result.misfits)} of {pairs} pairs of experiment and cluster fit.")
    return 2 if result.misfits else 0
