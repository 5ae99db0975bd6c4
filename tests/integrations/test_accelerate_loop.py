"""A training loop with accelerate on a data plane: the conformance suite.

Its ends are those of the plain loop in test_torch.py, so `make integrations` leaves them out.
"""

import pytest

from .conformance import EVERY_LAUNCHER, SEVERAL_RANKS, Runs, TrainerConformance
from .launching import Example


class TestAccelerateLoop(TrainerConformance):
    example = Example(script="accelerate_loop.py")

    @pytest.mark.full
    @pytest.mark.parametrize("launcher", [launcher for (launcher,) in SEVERAL_RANKS])
    def test_an_exception_in_rank_1_ends_every_rank_and_names_it(self, launcher: str, runs: Runs) -> None:
        super().test_an_exception_in_rank_1_ends_every_rank_and_names_it(launcher, runs)

    @pytest.mark.full
    @pytest.mark.parametrize("launcher", [launcher for (launcher,) in EVERY_LAUNCHER])
    def test_a_stop_file_ends_the_run_resumably(self, launcher: str, runs: Runs) -> None:
        super().test_a_stop_file_ends_the_run_resumably(launcher, runs)
