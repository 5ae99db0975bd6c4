"""`mixtera-hpc doctor`: what works on this machine, and how to cure what does not."""

from argparse import ArgumentParser, Namespace

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object per check and line")


def run(args: Namespace) -> int:
    from mixtera_hpc.config.run_folder import runs_root
    from mixtera_hpc.launch.doctor import examine_machine

    findings = examine_machine(runs_root())
    if args.json:
        import json
        from dataclasses import asdict

        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{finding.verdict:<6}  {finding.what:<{width}}  {finding.detail}")
            if finding.do:
                print(f"{'':<6}  {'':<{width}}  → {finding.do}")
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0
