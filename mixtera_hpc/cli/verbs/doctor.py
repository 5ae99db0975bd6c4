"""`mixtera-hpc doctor`: report what works on this machine, and how to repair what does not."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from mixtera_hpc.cli.console import print_json
from mixtera_hpc.config.run_folder import runs_root
from mixtera_hpc.launch.doctor import Finding, examine_machine

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object per check")
    parser.epilog = """\
Each check is ok, absent (not installed here, and not always needed) or wrong. The exit code is 1 if one is wrong."""


def run(args: Namespace) -> int:
    """Examine this machine and print the findings."""
    findings = examine_machine(runs_root())
    if args.json:
        for finding in findings:
            print_json(finding)
    else:
        _print_table(findings)
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0


def _print_table(findings: Sequence[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print(f"{finding.verdict:<6}  {finding.check:<{width}}  {finding.detail}")
        if finding.fix:
            print(f"{'':<6}  {'':<{width}}  → {finding.fix}")
