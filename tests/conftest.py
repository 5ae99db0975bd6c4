"""What several kinds of tests share."""

from pathlib import Path

import pytest

from mixtera_hpc.testing.small_collection import make_collection


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small real collection with an index; nobody changes it."""
    return make_collection(tmp_path_factory.mktemp("collection"))


@pytest.fixture
def own_collection(tmp_path: Path) -> list[str]:
    """Like `collection`, to be damaged."""
    return make_collection(tmp_path / "own")
