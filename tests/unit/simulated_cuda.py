"""A CUDA device that is simulated on the CPU: what would wait for it, and what would not wait although it must.

Tensors on it have their content on the CPU and say that they are on `cuda:0`. Every operation that torch dispatches on
them is checked:

- `HostWaits`: the operation makes the host wait for the device (`item`, a boolean mask as index, a copy from or to
  memory that is not pinned).
- `Race`: a stream uses what another stream writes, or writes what another stream reads, without waiting for it; or
  pinned memory is changed before the transfer has read it.

Copies to the host arrive when an event behind them is waited for; before that, the memory holds garbage. So a host that
reads too early gets wrong numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda", 0)
GARBAGE = 77

WAITING_OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_dim",
    "aten::_unique2",
}


class HostWaits(RuntimeError):
    """The host would wait for the device."""


class Race(RuntimeError):
    """Two streams, or a stream and the host, use the same memory without an order."""


class Stream:
    """A stream: its actions that the host has issued and the device has not done, and what it has waited for."""

    def __init__(self, device: Any = None) -> None:
        self.device = DEVICE
        self.clock: dict[Stream, int] = {self: 0}
        self.actions: list[Callable[[], None]] = []
        self.num_done = 0
        SimulatedCuda.active.streams.append(self)

    @property
    def is_done(self) -> bool:
        """True if the device has done everything that was issued."""
        return self.num_done == len(self.actions)

    def do_until(self, count: int) -> None:
        """Do the first actions."""
        while count > self.num_done:
            self.num_done += 1
            self.actions[self.num_done - 1]()

    def wait_event(self, event: "Event") -> None:
        for stream, time in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """A place in a stream."""

    def record(self, stream: Stream) -> None:
        self.stream = stream
        self.count = len(stream.actions)
        self.clock = dict(stream.clock)

    def query(self) -> bool:
        return self.stream.num_done >= self.count

    def synchronize(self) -> None:
        SimulatedCuda.active.num_waits += not self.query()
        self.stream.do_until(self.count)


class Memory:
    """Memory of the device."""

    def __init__(self, stream: Stream) -> None:
        self.owner = stream
        self.known = {stream}
        """Streams that the allocator waits for before it uses the memory again."""
        self.users: dict[Stream, int] = {}
        """Stream → time of its newest operation on the memory."""
        self.written = (stream, 0)

    def use(self, stream: Stream, *, writes: bool) -> None:
        """Note that the newest operation of `stream` uses the memory."""
        writer, time = self.written
        if stream.clock.get(writer, -1) < time:
            raise Race("a stream uses memory that another one writes, without waiting for it")
        if writes and any(stream.clock.get(user, -1) < time for user, time in self.users.items()):
            raise Race("a stream writes memory that another one uses, without waiting for it")
        self.users[stream] = stream.clock[stream]
        if writes:
            self.written = (stream, stream.clock[stream])


class CudaTensor(Tensor):
    """A tensor on the simulated device."""

    content: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, content: Tensor, memory: Memory) -> "CudaTensor":
        tensor: CudaTensor = Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(), dtype=content.dtype
        )
        tensor.content = content
        tensor.memory = memory
        return tensor

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None:
        self.memory.known.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SimulatedCuda.active.operation(func, args, kwargs or {})


class SimulatedCuda(TorchFunctionMode):
    """The device, while it is active."""

    active: "SimulatedCuda"

    def __init__(self) -> None:
        super().__init__()
        SimulatedCuda.active = self
        self.streams: list[Stream] = []
        self.num_waits = 0
        """Number of waits of the host for an event that was not complete."""
        self.current = Stream()
        self.operations: list[str] = []
        self._memories: list[Memory] = []
        self._pinned: dict[int, Tensor] = {}

    def tensor(self, content: Tensor) -> CudaTensor:
        """Return a tensor that the current stream computes."""
        return self._new(content.clone())

    def finish(self) -> None:
        """Do everything that was issued."""
        for stream in self.streams:
            stream.do_until(len(stream.actions))

    def check_frees(self) -> None:
        """Raise `Race` if memory could be used again while a stream still uses it."""
        for memory in self._memories:
            if not memory.users.keys() <= memory.known:
                raise Race("memory of another stream was used without record_stream")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make `stream` the current one."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do a dispatched operation in the current stream."""
        name = func._schema.name
        self.operations.append(str(func))
        indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::index_put") else ()
        has_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in WAITING_OPERATIONS or str(func) in WAITING_OPERATIONS or has_mask:
            raise HostWaits(str(func))

        inputs: list[CudaTensor] = []

        def unwrap(value: Any) -> Any:
            if isinstance(value, CudaTensor):
                inputs.append(value)
                return value.content
            if isinstance(value, Tensor) and value.ndim:
                raise HostWaits(f"{func} of a tensor on the CPU and one on the device")
            return value

        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        self._tick()
        written = args[0] if func._schema.is_mutable else None
        for tensor in inputs:
            tensor.memory.use(self.current, writes=tensor is written)
        wrappers = {id(tensor.content): tensor for tensor in inputs}
        memories = {tensor.content.untyped_storage().data_ptr(): tensor.memory for tensor in inputs}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in wrappers:
                return wrappers[id(value)]
            memory = memories.get(value.untyped_storage().data_ptr())
            return CudaTensor(value, memory) if memory and value.numel() else self._new(value)

        return tree_map(wrap, result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy", "item", "tolist") and isinstance(args[0], CudaTensor):
            raise HostWaits(name)
        if name == "pin_memory":
            return self._pin(args[0].clone())
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name == "to" and len(args) > 1 and isinstance(args[1], str | torch.device):
            return self._to(args[0], torch.device(args[1]), **kwargs)
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return self._new(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)

    def _new(self, content: Tensor) -> CudaTensor:
        memory = Memory(self.current)
        self._memories.append(memory)
        self._tick()
        memory.use(self.current, writes=True)
        return CudaTensor(content, memory)

    def _tick(self) -> None:
        self.current.clock[self.current] += 1

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _check_asynchronous(self, host: Tensor, non_blocking: bool) -> None:
        if not non_blocking or host.untyped_storage().data_ptr() not in self._pinned:
            raise HostWaits("a copy that blocks, or of memory that is not pinned")

    def _to(self, tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        if isinstance(tensor, CudaTensor) == (device.type == "cuda"):
            return tensor
        if isinstance(tensor, CudaTensor):
            raise HostWaits("to the CPU")
        return self._copy(self._new(torch.empty_like(tensor)), tensor, non_blocking)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, CudaTensor) and isinstance(source, CudaTensor):
            return self.operation(torch.ops.aten.copy_.default, (target, source), {})
        if isinstance(target, CudaTensor):
            self._check_asynchronous(source, non_blocking)
            target.content.copy_(source)
            before = source.clone()
            self._tick()
            target.memory.use(self.current, writes=True)

            def transfer() -> None:
                if not torch.equal(source, before):
                    raise Race("pinned memory was changed before the transfer has read it")

            self.current.actions.append(transfer)
        elif isinstance(source, CudaTensor):
            self._check_asynchronous(target, non_blocking)
            self._tick()
            source.memory.use(self.current, writes=False)
            content = source.content.clone()
            target.fill_(GARBAGE)
            self.current.actions.append(lambda: target.copy_(content))
        else:
            Tensor.copy_(target, source)
        return target


@contextmanager
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """Simulate a CUDA device."""
    device = SimulatedCuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", device.stream)
        patch.setattr(torch.cuda, "current_stream", lambda of=None: device.current)
        with device:
            yield device
            device.finish()
    device.check_frees()
