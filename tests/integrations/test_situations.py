"""Situations in which trainers and launchers once misled the data plane without a word, and the tests that cover them.

Each situation works, or is refused with the cure. This file fails when a test that covers one disappears.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

LAUNCHERS = "mpi/test_launchers.py"
ON_SLURM = "slurm/test_cluster_launchers.py"
CONFORMANCE = "integrations/conformance.py"

SITUATIONS = {
    "torchrun, own loop, no comm": [
        f"{LAUNCHERS}::test_torchrun_ranks_share_a_batch_through_the_process_group",
        f"{LAUNCHERS}::test_torchrun_ranks_that_would_train_alone_are_refused",
    ],
    "torchrun, own loop, comm=MPI.COMM_WORLD": [
        f"{LAUNCHERS}::test_torchrun_ranks_that_would_train_alone_are_refused",
    ],
    "torchrun, dataplane.comm=local": [
        f"{LAUNCHERS}::test_every_rank_of_torchrun_with_a_local_communicator_exits_with_2",
    ],
    "pipeline stages that are not neighbours": [
        "mpi/test_meshes.py::test_peers_get_the_same_and_data_parallel_ranks_share_the_batch",
        "unit/test_rank_layouts.py::test_peers_get_the_same_batches_in_every_order_of_dimensions",
    ],
    "losses on some ranks of a group only": [
        "mpi/test_meshes.py::test_losses_of_some_ranks_give_the_statistics_of_one_rank_bit_for_bit",
        "unit/test_open_steps.py::test_losses_count_once_whichever_ranks_of_a_group_record",
    ],
    "halves of sequences on two context-parallel ranks": [
        "mpi/test_layouts.py::test_every_layout_serves_the_same_and_counts_each_loss_once",
    ],
    "a loader that stacks batches": [
        "unit/test_training_dataset.py::test_a_loader_that_stacks_batches_is_refused",
    ],
    "Hugging Face Trainer with a PlaneDataset as train_dataset, or with an accumulation that does not fit": [
        "integrations/test_huggingface.py::test_settings_that_do_not_fit_are_refused",
        "integrations/test_huggingface.py::test_settings_that_fit_are_trained_with",
    ],
    "Lightning with a PlaneDataset": [
        "integrations/test_lightning_module.py::"
        "test_a_loader_without_the_data_module_works_although_lightning_fetches_ahead",
    ],
    "worker processes of a loader": [
        "unit/test_training_dataset.py::test_worker_processes_of_a_loader_are_refused",
    ],
    "a loader that fetches one batch ahead": [
        "integrations/test_accelerate_loaders.py::test_one_process_may_prepare_a_loader_that_fetches_one_batch_ahead",
        "unit/test_open_steps.py::test_batches_and_statistics_do_not_depend_on_the_look_ahead",
        "unit/test_open_steps.py::test_a_resume_begins_with_the_first_batch_that_was_not_finished",
        "unit/test_open_steps.py::test_a_loader_must_say_what_is_finished_before_a_state_is_saved",
        f"{CONFORMANCE}::test_two_jobs_with_a_checkpoint_between_them_serve_the_bare_stream",
    ],
    "accelerate with dispatch_batches=True or False": [
        "integrations/test_accelerate_loaders.py::test_two_ranks_are_refused_with_the_correct_set_up",
    ],
    "gradient accumulation": [
        f"{CONFORMANCE}::test_two_jobs_with_a_checkpoint_between_them_serve_the_bare_stream",
        f"{CONFORMANCE}::test_losses_reach_the_mixing_algorithm_and_the_log_of_the_trainer",
        "unit/test_training_dataset.py::test_micro_batches_are_recorded_without_naming_their_rows",
    ],
    "torch.distributed.checkpoint asks for the state before it loads": [
        "mpi/test_distributed_checkpoint.py::test_a_distributed_checkpoint_resumes_at_the_saved_step",
        "unit/test_plane_state.py::test_a_state_can_be_loaded_after_one_was_asked_for",
    ],
    "a dynamic mixture that hears no losses": [
        "unit/test_open_steps.py::test_a_mixture_that_hears_no_losses_is_reported_once",
    ],
    "srun -n1 torchrun": [
        f"{LAUNCHERS}::test_torchrun_inside_a_step_of_srun_is_the_innermost_launcher",
        f"{ON_SLURM}::test_torchrun_inside_one_task_of_srun_is_one_job",
    ],
    "mpiexec -n 2 torchrun": [
        f"{LAUNCHERS}::test_two_torchruns_under_mpiexec_are_two_jobs",
    ],
    "Slurm and torchrun, one task per node": [
        f"{ON_SLURM}::test_torchrun_started_by_one_task_per_node_is_one_job",
    ],
    "plain python inside salloc -n 4": [
        f"{LAUNCHERS}::test_plain_python_inside_salloc_is_one_process",
        f"{ON_SLURM}::test_plain_python_inside_salloc_is_one_process",
    ],
    "srun with a plugin that does not fit the MPI library": [
        f"{ON_SLURM}::test_srun_with_a_plugin_that_does_not_fit_is_refused",
    ],
    "a trainer that needs a process group, under mpiexec": [
        "mpi/test_replicas_launchers.py::test_two_ranks_get_a_group_and_the_variables_of_torchrun",
    ],
    "PMI_RANK is set, but mpi4py is missing": [
        "unit/test_missing_packages.py::test_a_launcher_of_mpi_without_mpi4py_is_answered_with_the_extra",
    ],
    "mpiexec python without -m mpi4py, an exception in one rank": [
        f"{LAUNCHERS}::test_an_exception_in_one_rank_ends_all_and_names_it",
        f"{LAUNCHERS}::test_an_error_that_only_rank_0_sees_while_opening_ends_all",
        f"{CONFORMANCE}::test_an_exception_in_rank_1_ends_every_rank_and_names_it",
    ],
}


def functions_of(path: Path) -> set[str]:
    """Return the names of all test functions and methods of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation_is_covered_by_a_test_that_exists(situation: str) -> None:
    missing = []
    for place in SITUATIONS[situation]:
        file, _, name = place.partition("::")
        path = TESTS / file
        if not path.exists() or name not in functions_of(path):
            missing.append(place)
    assert not missing
