"""Check that mixtera-hpc installs on clusters. Run by hand: it asks the package index, and takes some minutes.

python3 .ci/check_installation.py

1. In an environment that has its own torch, as the images of NGC and of uenv have, every extra installs, and torch
   stays as it is.
2. Every dependency has a wheel for aarch64 and each Python version. `SOURCE_ONLY` lists the exceptions.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXTRAS = "mpi,train,report,slurm,track,integrations"
EXTRAS_APART = "train,torchtitan"
"""Those that need an environment of their own."""

TORCH_OF_AN_IMAGE = "2.9.0a0+50eac811a6.nv25.9"
"""Like that of NGC: a development version that no package index has."""

SOURCE_ONLY = ["antlr4-python3-runtime==4.9.3"]
"""Pure Python without a wheel on PyPI; pip builds it without a compiler."""

AARCH64 = [f"manylinux_2_{glibc}_aarch64" for glibc in range(17, 29)] + ["manylinux2014_aarch64"]
"""Wheels that run with glibc 2.28 or newer."""


def call(*words: object) -> str:
    """Run a command and return what it printed; end the check if it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def new_environment(folder: Path) -> Path:
    """Return the Python of a new environment with the newest pip, which can resolve without downloading."""
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    call(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    return python


def write_torch_wheel(folder: Path) -> Path:
    """Write a wheel that stands for the torch of an image: pip sees its version, nothing imports it."""
    path = folder / f"torch-{TORCH_OF_AN_IMAGE}-py3-none-any.whl"
    metadata = f"torch-{TORCH_OF_AN_IMAGE}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("torch/of_the_image", "")
        wheel.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH_OF_AN_IMAGE}\n")
        wheel.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nGenerator: check\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{metadata}/RECORD", "")
    return path


def check_torch_stays(folder: Path, wheel: Path) -> None:
    """Install every extra beside an image's torch."""
    python = new_environment(folder / "image")
    call(python, "-m", "pip", "install", "--no-index", write_torch_wheel(folder))
    (torch,) = (folder / "image/lib").glob("python3*/site-packages/torch")
    before = sorted(path.name for path in torch.iterdir())
    call(python, "-m", "pip", "install", "--quiet", f"mixtera-hpc[{EXTRAS}] @ {wheel.as_uri()}")

    packages = {
        package["name"]: package["version"]
        for package in json.loads(call(python, "-m", "pip", "list", "--format=json"))
    }
    after = sorted(path.name for path in torch.iterdir())
    cuda = [name for name in packages if name.startswith("nvidia-")]
    if packages["torch"] != TORCH_OF_AN_IMAGE or after != before or cuda:
        sys.exit(f"torch {TORCH_OF_AN_IMAGE} became {packages['torch']}; its files {before} became {after}; {cuda}")
    call(folder / "image/bin/mixtera-hpc", "plan", "--help")
    print(f"torch {TORCH_OF_AN_IMAGE} stays beside mixtera-hpc[{EXTRAS}] and {len(packages) - 2} other packages")


def check_wheels(folder: Path, python_version: str, links: Path, extras: str) -> None:
    """Resolve extras for aarch64 from wheels only. Environment markers are those of this machine."""
    python = folder / "resolver/bin/python"
    report = folder / f"report-{python_version}.json"
    platforms = [f"--platform={name}" for name in AARCH64]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}", *platforms]
    words = ["--dry-run", "--ignore-installed", f"--target={folder / 'nothing'}", f"--report={report}"]
    call(python, "-m", "pip", "install", "--quiet", *words, *target, f"--find-links={links}", f"mixtera-hpc[{extras}]")

    urls = [package["download_info"]["url"] for package in json.loads(report.read_text())["install"]]
    compiled = [url for url in urls if url.endswith("aarch64.whl")]
    print(f"[{extras}], Python {python_version}, aarch64: {len(urls)} wheels, {len(compiled)} of them compiled")


def python_versions() -> list[str]:
    """Return the versions that pyproject.toml names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    return [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith(prefix)]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        links = folder / "links"
        python = new_environment(folder / "resolver")
        call(python, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={links}", REPOSITORY, *SOURCE_ONLY)
        (wheel,) = links.glob("mixtera_hpc-*.whl")
        print(f"{datetime.now(UTC):%Y-%m-%d}; built from source: {', '.join(SOURCE_ONLY)}")
        check_torch_stays(folder, wheel)
        for version in python_versions():
            check_wheels(folder, version, links, EXTRAS)
            check_wheels(folder, version, links, EXTRAS_APART)


if __name__ == "__main__":
    main()
