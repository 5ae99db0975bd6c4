"""`Local` passes the conformance suite of communicators."""

from collections.abc import Callable

import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.testing.communicators import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_local_conforms_to_the_protocol(check: Callable[[Communicator], None]) -> None:
    check(Local())


def test_abort_ends_the_process_with_the_given_code() -> None:
    with pytest.raises(SystemExit) as ended:
        Local().Abort(3)
    assert ended.value.code == 3
