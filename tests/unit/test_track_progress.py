"""The lines that a training run prints about its progress."""

import pytest

from mixtera_hpc.track.event_types import AttemptEvent
from mixtera_hpc.track.progress import ProgressPrinter


def test_a_single_rank_node_or_domain_is_printed_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    event = AttemptEvent(step=0, num_ranks=1, num_nodes=1, device="cpu", num_parameters=1_500_000, domains=["en"])
    ProgressPrinter(10, lambda step: None).log("attempts", event)

    text = capsys.readouterr().err
    assert "step 0 of 10: starts: 1 rank on 1 node, cpu, 1.50 M parameters, 1 domain\n" in text


@pytest.mark.parametrize(("lanes", "text"), [(1, ", 1 lane\n"), (16, ", 16 lanes\n"), (None, "1 domain\n")])
def test_the_number_of_lanes_is_printed_where_there_are_any(
    lanes: int | None, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    event = AttemptEvent(step=0, num_ranks=1, num_nodes=1, device="cpu", num_parameters=1, domains=["en"], lanes=lanes)
    ProgressPrinter(10, lambda step: None).log("attempts", event)
    assert text in capsys.readouterr().err
