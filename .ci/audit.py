"""Compare the pinned packages with the database of known vulnerabilities, where one can be reached.

Ends with 1 if a package has a known vulnerability. Without a network, or without pip-audit, it says so and ends with 0.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATABASE = "https://pypi.org/pypi/numpy/1.24.0/json"
"""Address that pip-audit asks for each package."""
REACH_LIMIT_S = 5
INSTALL_LIMIT_S = 120
AUDIT_LIMIT_S = 300


def main() -> int:
    """Audit `constraints.txt` and return the exit code."""
    problem = database_problem()
    if problem:
        return skip(f"no database of vulnerabilities is reachable ({problem})")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        try:
            command = [python, "-m", "pip", "install", "--quiet", "pip-audit"]
            subprocess.run(command, check=True, timeout=INSTALL_LIMIT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return skip(f"pip-audit cannot be installed ({error})")
        # All dependencies are pinned, so nothing is resolved or installed.
        command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", ROOT / "constraints.txt"]
        try:
            return subprocess.run(command, check=False, timeout=AUDIT_LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            return skip(f"the database did not answer within {AUDIT_LIMIT_S} s")


def database_problem() -> str:
    """Return why the database cannot be used; empty if it can."""
    try:
        with urllib.request.urlopen(DATABASE, timeout=REACH_LIMIT_S) as answer:
            return "" if "vulnerabilities" in json.load(answer) else "the package index has none"
    except (OSError, ValueError) as error:
        return str(error)


def skip(reason: str) -> int:
    """Say that nothing was audited."""
    print(f"Packages are not audited: {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
