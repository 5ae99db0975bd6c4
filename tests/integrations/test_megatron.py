"""The example of a loop on megatron-core's groups of ranks."""

import pytest

from .conformance import NUM_STEPS, Runs, TrainerConformance
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
