"""The example of a loop on megatron-core's groups of ranks.

A stop of several ranks is that of the plain loop in test_torch.py, and test_megatron_pretrain.py stops `MegatronData`:
`make integrations` leaves both together out.
"""

import pytest

from .conformance import EVERY_LAUNCHER, NUM_STEPS, Runs, TrainerConformance
from .launching import Example
from .served_stream import read_records, trained_digests

pytest.importorskip("megatron.core")


class TestMegatron(TrainerConformance):
    example = Example(script="megatron_groups.py")

    @pytest.mark.full
    def test_ranks_of_a_tensor_parallel_group_train_on_the_same_sequences(
        self, runs: Runs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TENSOR_PARALLEL", "2")
        out = runs.new_folder("tensor-parallel")
        runs.launch("torchrun", out, "--steps", NUM_STEPS, "--accumulate", 2)

        records = read_records(out)
        assert trained_digests(records) == runs.stream.digests
        first, second = ([record.digests for record in records if record.rank == rank] for rank in (0, 1))
        assert first == second

    @pytest.mark.full
    @pytest.mark.parametrize("launcher", [launcher for (launcher,) in EVERY_LAUNCHER])
    def test_a_stop_file_ends_the_run_resumably(self, launcher: str, runs: Runs) -> None:
        super().test_a_stop_file_ends_the_run_resumably(launcher, runs)
