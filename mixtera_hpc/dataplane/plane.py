"""`DataPlane`: the public interface for a training script.

    with DataPlane.open(config, comm=MPI.COMM_WORLD) as plane:
        for batch in plane:
            loss_per_token = train_step(batch)
            plane.record(batch, loss_per_token)
            if plane.stop_requested():
                save(plane.state_dict())
                break

All MPI calls happen in the caller's thread, inside these methods. Warnings go to the logger `mixtera_hpc`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.comm.launcher import end_job, mark_saved
from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.files.file_trust import deny_world_write
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.holdout import Split
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.dataplane.opening import OpenOptions, RankLayout, open_or_end_job
from mixtera_hpc.dataplane.plane_state import STATE_KEY, PlaneState
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.resume.recorded_lanes import with_recorded_lanes
from mixtera_hpc.dataplane.session import Session, start_session
from mixtera_hpc.dataplane.steps.open_steps import RecordedPart
from mixtera_hpc.dataplane.unstarted_session import UnstartedSession
from mixtera_hpc.errors import SavedAndStopped, exit_code_of, is_clean_exit
from mixtera_hpc.track.tracker import Tracker

__all__ = ["Batch", "DataPlane"]


class DataPlane:
    """One rank's view of the data of a run. Every rank makes the same calls in the same order.

    A run that continues in its folder serves the index as it was when the run began, even if the index was refreshed
    since; set `index.generations` to choose other states. What was dropped from the run stays dropped.

    After an exception in one rank, in `open` or inside the `with` block, that rank is named and all ranks end. Only a
    caller who gives `open` a `Communicator` does that itself (`run_guarded`).
    """

    def __init__(self, resources: PlaneResources, ends_job: bool = False) -> None:
        """Use `DataPlane.open`.

        Args:
            resources: what the plane works with.
            ends_job: after an exception inside the `with` block, name this rank and end the others.
        """
        self._resources = resources
        self._ends_job = ends_job
        self._session: Session | UnstartedSession = UnstartedSession(resources)
        """Starts with the first batch, or when a state is loaded."""
        self._is_closed = False

    @classmethod
    def open(
        cls,
        config: Config,
        comm: Any = None,
        folder: RunFolder | None = None,
        attempt: int | None = None,
        tracker: Tracker | None = None,
        split: Split = "train",
        *,
        data_parallel: tuple[int, int] | None = None,
        mesh: Any = None,
        data_dims: Sequence[str] = ("dp",),
        loss_parts: Sequence[str] = (),
        subset: bool = False,
    ) -> Self:
        """Open the index and get ready to serve. **Collective.**

        Args:
            comm: an mpi4py communicator, a torch process group, or None to detect how this process was started. With a
                `Communicator` the caller ends the job after an error in one rank (`run_guarded`).
            folder: the folder of the run; without one nothing is recorded, and no control files are looked for. It gets
                `config.yaml` if it has none, so that the command line knows the run.
            attempt: number of this attempt; None: that of the batch job, or the next one, which is recorded here.
            tracker: receives the metric events of the data plane on rank 0. None: with a folder, those and the time and
                losses of every step go to `metrics/` in it.
            split: with `query.holdout`, the side that is served.
            data_parallel: data-parallel rank of this rank, and data-parallel size. Ranks with the same one get the same
                batches. None: `dataplane.model_parallel_size` neighbours get the same batches.
            mesh: instead of `data_parallel`, a torch `DeviceMesh` over all ranks.
            data_dims: the dimensions of `mesh` along which ranks get different batches, the outermost first.
            loss_parts: the dimensions of `mesh` whose ranks each record a part of every sequence, for example
                `("cp",)`; `record(tokens=)` says which part. The parts are added before a loss is rounded.
            subset: only some of the processes that the launcher started take part.

        Raises:
            LaunchError: the ranks that the launcher started do not see each other.
            ConfigError: the ranks cannot share the global batch evenly.
            PropertyIndexError: the index is missing or stale, or was built with another tokenizer.
            MixtureError: a domain of the mixture has no samples.
        """
        if folder is not None:
            deny_world_write()
        options = OpenOptions(folder=folder, attempt=attempt, tracker=tracker, split=split)
        layout = RankLayout(
            data_parallel=data_parallel, mesh=mesh, data_dims=data_dims, loss_parts=loss_parts, subset=subset
        )
        return cls(open_or_end_job(config, comm, layout, options), ends_job=not isinstance(comm, Communicator))

    @property
    def config(self) -> Config:
        """The configuration that is served, with the index generations and the number of lanes of the run."""
        return self._resources.source.config

    @property
    def domain_names(self) -> list[str]:
        """Name of every domain, by domain_id."""
        return self._resources.source.names

    @property
    def num_domains(self) -> int:
        """Number of domains."""
        return self._resources.source.num_domains

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary; 0 without a tokenizer."""
        return self._resources.source.tokenizer.vocab_size if self._resources.source.tokenizer else 0

    @property
    def local_batch_size(self) -> int:
        """Sequences in the next batch of this rank; the same in every batch without `dataplane.batch_schedule`."""
        schedule = self._resources.source.planner.batch_schedule
        return self._resources.batch_slice.size_of(schedule.size_at(self._session.next_data_step))

    @property
    def num_groups(self) -> int:
        """Number of groups of ranks that get different sequences: the data-parallel size."""
        return self._resources.batch_slice.num_groups

    @property
    def local_batch_sizes(self) -> dict[str, int]:
        """Sequences that this rank gets per step, by the key that sets them; several with a batch ramp.

        Only stages with steps to come count. Before the first batch that is the last stage: a state may still be
        loaded.
        """
        sizes = self._session.stages_to_come
        return {key: self._resources.batch_slice.size_of(size) for key, size in sizes.items()}

    def num_local_sequences(self, num_steps: int) -> int:
        """Return the sequences that this rank gets in the first `num_steps` steps of a run."""
        schedule = batch_schedule_of(self.config.dataplane)
        return self._resources.batch_slice.size_of(schedule.sequences_before(num_steps))

    @property
    def next_step(self) -> int:
        """The training step of the next batch."""
        return self._session.next_step

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weight of every domain in the current chunk, shape (K,), on every rank; zeros before the first batch."""
        return self._session.weights

    @property
    def data_wait_s(self) -> float:
        """Seconds that the trainer waited for the last batch."""
        return self._session.data_wait_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error
        try:
            self._close(orderly=error is None or is_clean_exit(error), error=error)
        except BaseException as close_error:
            failure = close_error
            raise
        finally:
            if self._ends_job and failure is not None:
                end_job(self._resources.comm, failure)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches until the data ends; every rank gets the same number; see `batches`. **Collective.**"""
        return self.batches()

    def batches(self, *, pause_to_save: bool = False) -> Iterator[Batch]:
        """Yield batches; end early, `is_interrupted`, if a stop is requested while a read hangs. **Collective.**

        With `pause_to_save`, end early for a save too; the caller asks `save_requested`, saves, and calls this again.
        """
        session = self._started_session()
        session.pauses_to_save = pause_to_save
        # No variable here holds a batch: its memory is free as soon as the trainer drops it.
        yield from iter(session.next_batch, None)

    @property
    def is_interrupted(self) -> bool:
        """True if the last iteration was ended by a request to save or stop, and not by the end of the data."""
        return self._session.is_interrupted

    def record(
        self,
        batch: Batch | Mapping[str, Any],
        loss: Any,
        *,
        rows: slice = slice(None),
        tokens: slice | None = None,
        num_tokens: Any = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> None:
        """Add losses of `batch` to the statistics of its step.

        A step is finished when all its sequences were recorded. It also finishes the steps before it; those that no
        rank recorded are no observation. Ranks without a loss need not call this.

        Args:
            batch: a batch that was handed out and is not finished, or a mapping with its `step`. The `positions` of
                either say which sequences it holds; without them it holds all. Micro-batches need no `rows` then.
            loss: cross-entropy in nats of every predicted token; array or torch tensor on any device, shape (B, T).
                Tokens outside `batch.loss_mask` do not count. Only tensors on an accelerator are kept beyond the call.
                With `mixture.unit=samples` the loss of every sample, shape (B,).
            rows: which sequences of `batch` the losses belong to, for micro-batches.
            tokens: which predicted tokens of these sequences the losses belong to; None for all.
            num_tokens: if `loss` has one sum per sequence, shape (B,), the number of tokens in each sum. That of a
                sample is its weight, of which 0 leaves it out.
            scalars: numbers of each sequence besides the loss, such as a reward, by the names in `dataplane.scalars`;
                shape (B,) each. `DomainStatistics.scalars` has their sums per domain. Where ranks record parts of
                sequences, those of a group's first rank count.

        Raises:
            ValueError: the step is finished or was not handed out, or the losses have another shape.
            CommError: the losses were recorded before. A refused call records nothing.
        """
        part = RecordedPart(rows=rows, tokens=tokens, num_tokens=num_tokens, scalars=scalars)
        self._session.record(batch, loss, part)

    def finish(self, batch: Batch | Mapping[str, Any]) -> None:
        """Finish the step of `batch` and all steps before it, for a trainer that does not record losses.

        Args:
            batch: a batch that was handed out and is not finished, or a mapping with its `step`.

        Raises:
            ValueError: the step is finished or was not handed out.
        """
        self._session.finish_step(batch)

    def expect_loader(self) -> None:
        """Tell the data plane that a loader reads it, which may ask for batches ahead of the trainer. **Collective.**

        `state_dict` then refuses to guess which batches are finished: `record` or `finish` must have said so.
        """
        self._started_session().expect_loader()

    def held_out(self, folder: RunFolder | None = None) -> HeldOutBatches:
        """Open the samples that `query.holdout` excludes from training, for the same layout of ranks. **Collective.**

        Args:
            folder: folder of the run, whose dropped samples are left out; None: the one that `open` was given.

        Raises:
            MixtureError: less than one global batch is held out.
            ConfigError: the ranks cannot share the batches of a validation evenly.
        """
        # The order of held-out samples depends on the number of lanes. A state that is loaded later must have it, too.
        self._resources = replace(self._resources, has_fixed_lanes=True)
        return HeldOutBatches(
            self.config,
            self._resources.comm,
            self._resources.batch_slice,
            folder=folder or self._resources.folder,
            parts=self._resources.parts,
            log=self._take_held_out,
        )

    def stop_requested(self) -> bool:
        """Return whether all ranks should save and leave now, the same answer on each. **Collective.**

        A signal or `control/stop` that is seen during step s makes this True after step s + 1. A trainer that never
        calls this survives SIGTERM.
        """
        return self._session.stop_requested()

    def save_requested(self) -> bool:
        """Return whether all ranks should save and continue: once per request, alike on all ranks. **Collective.**"""
        return self._session.save_requested()

    def completed_statistics(self) -> list[DomainStatistics]:
        """Return the statistics, summed over all ranks, of the steps completed since the last call, in order.

        Only the newest `MAX_UNREAD_STATISTICS` steps are kept, so a trainer does not have to call this.
        """
        return self._session.completed_statistics()

    def state_dict(self) -> dict[str, NDArray[np.uint8]]:
        """Return the state after the last finished step, the same value on every rank. **Collective.**

        Batches that were handed out and are not finished are served again after a resume. If no rank has called
        `record` or `finish`, all batches are finished. Before the first batch this is the state that a run begins with,
        and another state may still be loaded.

        Returns:
            `{"plane": array}` with one uint8 array: the bytes of an npz file, see `plane_state`; O(domains).

        Raises:
            ConfigError: a loader reads the batches, and no rank has said which steps are finished.
        """
        own = self._session.state()
        # Any rank may be the one that writes a checkpoint, and torch.distributed.checkpoint asks all of them.
        content = own.to_array().tobytes() if own is not None else None
        shared = bcast_bytes(self._resources.comm, content)
        return {STATE_KEY: np.frombuffer(shared, np.uint8).copy()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a saved state; call it before the first batch. **Collective.**

        Args:
            state: what `state_dict` returned; the array may have become a torch tensor. Every rank may give it, only
                that of rank 0 counts; the others may give None.

        Raises:
            ConfigError: the state belongs to a run with other settings.
            DataError: the state is damaged.
            ValueError: batches were served already, or rank 0 gave no state.
        """
        # The session begins at its resume point; it cannot be moved afterwards.
        if isinstance(self._session, Session):
            raise ValueError("load_state_dict() was called after the first batch. Call it before.")
        # Launchers often load a checkpoint on every rank. Only the state of rank 0 counts.
        if self._resources.comm.rank != 0:
            state = None
        elif not state:
            raise ValueError("load_state_dict() got no state on rank 0. To begin a run, do not call it.")
        saved = PlaneState.from_state_dict(state) if state else None
        self._resources = with_recorded_lanes(self._resources, saved)
        self._session = start_session(self._resources, saved)

    def close(self, orderly: bool = True) -> None:
        """Stop the reading thread and free everything. **Collective.**

        Args:
            orderly: complete what other ranks may wait for, and record that the attempt ended in order. False on a rank
                that fails by itself: the call is then not collective.
        """
        self._close(orderly, error=None)

    def _close(self, orderly: bool, error: BaseException | None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        # Other ranks may be waiting for our part of a broadcast or reduction.
        next_step = self._session.finish() if orderly else None
        self._session.close(orderly)
        self._resources.control.close()
        exit_code = self._exit_code(orderly, error)
        self._resources.recorder.close(next_step, exit_code)
        # A program of the user's saves by itself and leaves with 0; its job is to continue nevertheless.
        if self._ends_job and exit_code == SavedAndStopped.exit_code:
            mark_saved(self._resources.comm)
        if orderly and not self.is_interrupted:
            # A rank that fails by itself must not free collectively: the others do not take part. After an interrupted
            # wait, a thread may still read: what it reads from stays until the process ends.
            self._resources.comm.Free()

    def _exit_code(self, orderly: bool, error: BaseException | None) -> int:
        """Return the exit code that the attempt is recorded with."""
        if error is not None:
            return exit_code_of(error)
        if not orderly:
            return 1
        return SavedAndStopped.exit_code if self._session.is_stopping else 0

    def _take_held_out(self, statistics: DomainStatistics, mean_loss: float | None) -> None:
        """Log held-out losses, and give them to a mixing algorithm that learns from them."""
        self._resources.recorder.log_validation(statistics, mean_loss)
        self._session.feed_held_out(statistics)

    def _started_session(self) -> Session:
        """Return the session; the first call begins the run. **Collective.**"""
        if isinstance(self._session, UnstartedSession):
            self._session = start_session(self._resources, None)
        return self._session
