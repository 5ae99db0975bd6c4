"""`mixtera-hpc cancel`: end a run, now or after it has saved."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder")
    parser.add_argument("--after-save", action="store_true", help="let it save first; nothing follows")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: Namespace) -> int:
    from mixtera_hpc.config.run_folder import RunFolder, runs_root
    from mixtera_hpc.launch.cancel import cancel_after_save, cancel_now

    folder = RunFolder.find(args.run_name, args.root or runs_root())
    done = cancel_after_save(folder) if args.after_save else cancel_now(folder)
    if done.ended:
        print(f"ended   {' '.join(done.ended)}")
    if done.saving:
        print(f"saving  {' '.join(done.saving)}")
    print(f"  mixtera-hpc resume {folder.path}")
    return 0
