"""The doctor's verdict on installed packages."""

from mixtera_hpc.launch.doctor import Finding, package_findings

INSTALLED = {"numpy": "2.1", "torch": "2.6", "mpi4py": "4.1", "mpich": "5.0"}


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


def test_complete_packages_are_ok() -> None:
    assert verdicts(package_findings(INSTALLED)) == {"packages": "ok"}


def test_a_missing_required_package_is_wrong() -> None:
    findings = package_findings({**INSTALLED, "numpy": None})
    assert verdicts(findings) == {"packages": "wrong"}
    assert findings[0].fix == "pip install numpy"


def test_missing_optional_packages_are_absent_and_their_extras_named() -> None:
    findings = package_findings({**INSTALLED, "torch": None, "mpi4py": None})
    assert verdicts(findings) == {"packages": "ok", "extras": "absent"}
    assert "mixtera-hpc[mpi,train]" in (findings[1].fix or "")


def test_the_mpi_library_for_laptops_is_not_required() -> None:
    assert verdicts(package_findings({**INSTALLED, "mpich": None})) == {"packages": "ok"}
