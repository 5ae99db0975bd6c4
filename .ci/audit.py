"""Compare the pinned packages with pip-audit's database of known vulnerabilities, where it can be reached.

Ends with 1 if a package has a known vulnerability. Without a network, or without pip-audit, it says so and ends with 0.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUEST_LIMIT_S = 5
INSTALL_LIMIT_S = 120
AUDIT_LIMIT_S = 120


def main() -> int:
    """Audit `constraints.txt` and return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        try:
            command = [python, "-m", "pip", "install", "--quiet", "pip-audit"]
            subprocess.run(command, check=True, timeout=INSTALL_LIMIT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return skip(f"pip-audit cannot be installed ({error})")
        return audit(python, Path(folder) / "result.json")


def audit(python: Path, result: Path) -> int:
    """Run pip-audit and return the exit code; `result` is the file for its JSON output."""
    # All dependencies are pinned, so nothing is resolved or installed.
    command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "--timeout", str(REQUEST_LIMIT_S)]
    command += ["--format", "json", "--output", result, "-r", ROOT / "constraints.txt"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=AUDIT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return skip(f"the database did not answer within {AUDIT_LIMIT_S} s")
    # pip-audit ends with 1 for a vulnerability and for a database that cannot be reached; only the first has a result.
    if not result.is_file():
        reason = done.stderr.strip().splitlines() or ["pip-audit wrote no result"]
        return skip(reason[-1])
    for package in json.loads(result.read_text())["dependencies"]:
        for known in package.get("vulns", []):
            print(f"{package['name']} {package['version']} has {known['id']}; fixed in {known['fix_versions']}")
    print(done.stderr.strip())
    return done.returncode


def skip(reason: str) -> int:
    """Say that nothing was audited."""
    print(f"Packages are not audited: {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
