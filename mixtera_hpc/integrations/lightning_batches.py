"""The loaders that `PlaneDataModule` gives to Lightning, and the losses of what they have handed out."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.integrations.torch import PlaneDataset, as_tensors, micro_batches

__all__ = ["LOSS_KEY", "HandedOut", "HeldOutLoader", "TrainLoader"]

LOSS_KEY = "loss_per_token"
"""Key of the losses in the dict that `training_step` and `validation_step` return."""


class HandedOut:
    """Micro-batches that a loader has handed to Lightning, and the losses of the batch that is worked on.

    Lightning may fetch a batch ahead, and hooks may change the dicts. So this object remembers the order. Losses are
    recorded when the last micro-batch of a batch has ended: for a training batch, after the optimizer step.
    """

    def __init__(self, target: DataPlane | HeldOutBatches, num_micro: int, *, pin: bool) -> None:
        """Begin without batches.

        Args:
            target: what the losses are recorded in.
            num_micro: micro-batches of one batch.
            pin: copy the tensors to pinned memory, for asynchronous copies to a GPU.
        """
        self.num_micro = num_micro
        self.num_ended = 0
        """Micro-batches that have ended."""
        self.current: dict[str, Any] | None = None
        """Step and positions of the micro-batch that is worked on; None for a batch of another loader."""
        self._target = target
        self._pin = pin
        self._waiting: deque[dict[str, Any]] = deque()
        self._losses: list[tuple[dict[str, Any], Any, dict[str, Any]]] = []

    def clear(self) -> None:
        """Forget what was handed out."""
        self.num_ended = 0
        self.current = None
        self._waiting.clear()
        self._losses.clear()

    def hand_out(self, batch: Batch) -> dict[str, Any]:
        """Return a micro-batch as Lightning gets it."""
        # On the host: reading the step from a tensor on a GPU would wait for the device.
        self._waiting.append({"step": batch.step, "positions": batch.positions})
        tensors = as_tensors(batch)
        if not self._pin:
            return tensors
        return {
            name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()
        }

    def begin(self) -> None:
        """Begin with the next micro-batch."""
        self.current = self._waiting.popleft() if self._waiting else None

    def add(self, loss: Any, **which: Any) -> None:
        """Add losses of the current micro-batch; `which` are further arguments of `record`."""
        if self.current is not None:
            # Copies: the next micro-batch may use the memory again, as the outputs of a CUDA graph.
            self._losses.append((self.current, _copied(loss), {name: _copied(part) for name, part in which.items()}))

    def end(self, outputs: Any) -> bool:
        """End the micro-batch with what the user's step returned; return whether it was the last one of its batch."""
        if isinstance(outputs, Mapping) and outputs.get(LOSS_KEY) is not None:
            self.add(outputs[LOSS_KEY])
        self.num_ended += 1
        return self.num_ended % self.num_micro == 0

    def record(self) -> bool:
        """Record the losses of the batch that has ended; return whether there were any."""
        losses = list(self._losses)
        self._losses.clear()
        for micro_batch, loss, which in losses:
            self._target.record(micro_batch, loss, **which)
        return bool(losses)


def _copied(value: Any) -> Any:
    """Return a value with copies of the tensors that it holds, without their gradients."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    return value


class TrainLoader:
    """The micro-batches of the remaining steps. Each epoch continues where the last one ended.

    It is no `DataLoader`: for those, Lightning warns that there are no workers, and looks for a sampler.
    """

    def __init__(self, plane: DataPlane, num_micro: int, num_steps: int | None, *, pin: bool) -> None:
        """Wrap an open data plane.

        Args:
            plane: the data plane.
            num_micro: micro-batches of one step.
            num_steps: steps of the whole run; None if unknown.
            pin: copy the tensors to pinned memory.
        """
        self.handed_out = HandedOut(plane, num_micro, pin=pin)
        self.is_at_end = False
        """True if the data has ended, or `num_steps` steps were handed out."""
        self._dataset = PlaneDataset(
            plane,
            collate=self.handed_out.hand_out,
            num_micro_batches=num_micro,
            num_steps=num_steps,
        )
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Return the micro-batches of the whole run; TypeError if its length is unknown."""
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next micro-batch. **Collective.**"""
        if self._batches is None:
            self._batches = iter(self._dataset)
        try:
            return next(self._batches)
        except StopIteration:
            self.is_at_end = True
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the state is that of the data module. Lightning warns about loaders without this method."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class HeldOutLoader:
    """The held-out micro-batches, the same ones in every validation."""

    def __init__(self, held_out: HeldOutBatches, num_micro: int, *, pin: bool) -> None:
        """Wrap the held-out batches of a run; the arguments are those of `TrainLoader`."""
        self.handed_out = HandedOut(held_out, num_micro, pin=pin)
        self.held_out = held_out

    def __len__(self) -> int:
        return self.held_out.num_batches * self.handed_out.num_micro

    def __iter__(self) -> Iterator[Any]:
        # Lightning may have left the last validation early.
        self.handed_out.clear()
        for batch in self.held_out.batches():
            for micro_batch in micro_batches(batch, len(batch.positions) // self.handed_out.num_micro):
                yield self.handed_out.hand_out(micro_batch)
