"""Context parallel: what the ranks of a group pass on to each other, and its gradients, which go the other way.

A rank has two neighbours. In the forward pass it gets, in each layer, the last inputs of the convolution and the states
of the memories whose sequences go on across the cut before its part, and hands on its own; in the backward pass it gets
the gradients of what it has handed on. Both are autograd functions, `Receive` and `HandOn`. Messages between two ranks
carry no names: each arrives in the order in which it was sent. That order is the same on both sides, since every rank
runs the same operations, and autograd runs them backwards in the reverse order of their making.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cache import TNTCacheLayer, fast_weight_shapes
from .configuration import TNTConfig
from .context_plan import Cut, Part
from .kernels import MemoryParams, MemoryState, initial_memory_state
from .kernels.transfer import on_device
from .kernels.types import FastWeights, MemoryOptions

CONV = "conv"

# What each group is sending. It must not be forgotten with the model, or what has not gone yet is never sent.
_SENDING: WeakKeyDictionary[dist.ProcessGroup, deque[tuple[dist.Work, Tensor, str]]] = WeakKeyDictionary()


class ContextParallelError(RuntimeError):
    """The processes of a context-parallel group have lost each other: one has died, or waits for something else."""


class Neighbours:
    """Messages to the ranks before and behind this one in a process group, and their count.

    sent_bytes      payload of all messages sent.
    waited_seconds  time in which the host was blocked by messages that were not there yet. (With NCCL the device waits
                    in its stream, and the host does not.)
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._sending = _SENDING.setdefault(group, deque())
        self.reset_counts()

    def reset_counts(self) -> None:
        self.sent_bytes, self.waited_seconds = 0, 0.0

    def send(self, message: Tensor, rank: int, what: str) -> None:
        """Begin to send; the tensor is kept until it is gone."""
        message = message.contiguous()
        self._forget_sent()
        with self._explained("send", what, rank):
            work = dist.isend(message, dst=dist.get_global_rank(self.group, rank), group=self.group)
        self._sending.append((work, message, what))
        self.sent_bytes += message.numel() * message.element_size()

    def expect(self, numbers: int, dtype: torch.dtype, device: torch.device, rank: int, what: str) -> Incoming:
        """Begin to receive a message of so many numbers."""
        message = torch.empty(numbers, dtype=dtype, device=device)
        with self._explained("receive", what, rank):
            work = dist.irecv(message, src=dist.get_global_rank(self.group, rank), group=self.group)
        return Incoming(self, work, message, rank, what)

    def wait(self, work: dist.Work, rank: int, what: str) -> None:
        began = time.perf_counter()
        with self._explained("receive", what, rank):
            work.wait()
        self.waited_seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        while self._sending:
            work, _, what = self._sending.popleft()
            with self._explained("send", what, None):
                work.wait()

    def _forget_sent(self) -> None:
        while self._sending and self._sending[0][0].is_completed():
            work, _, what = self._sending.popleft()
            with self._explained("send", what, None):
                work.wait()

    def _explained(self, verb: str, what: str, rank: int | None) -> AbstractContextManager:
        other = "its neighbour" if rank is None else f"rank {rank}"
        return explained(self.group, f"{verb} {what} {'to' if verb == 'send' else 'from'} {other}")


@contextmanager
def explained(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Errors of torch.distributed inside become a ContextParallelError that says what this rank could not do."""
    try:
        yield
    except RuntimeError as error:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        raise ContextParallelError(
            f"rank {rank} of {size} in the context-parallel group could not {what}: another process has ended, or did "
            "not get there within the group's time limit; the first error of all processes is the cause. "
            f"({str(error).splitlines()[0]:.300})"
        ) from error


class Incoming(NamedTuple):
    """A message on its way."""

    neighbours: Neighbours
    work: dist.Work
    message: Tensor
    rank: int
    what: str

    def wait(self) -> Tensor:
        self.neighbours.wait(self.work, self.rank, self.what)
        return self.message


class Receive(torch.autograd.Function):
    """A message from the rank before; its gradient goes back there. `anchor` requires a gradient where ours does."""

    @staticmethod
    def forward(ctx, anchor: Tensor, relay: Relay, name: str) -> Tensor:
        ctx.relay, ctx.name = relay, name
        return relay.fetch(name)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        relay = ctx.relay
        relay.neighbours.send(grad, relay.neighbours.rank - 1, f"the gradient of {relay.describe(ctx.name)}")
        return None, None, None


class HandOn(torch.autograd.Function):
    """Sends a message to the rank behind and returns o; in the backward pass the message's gradient comes from there.

    The message must go wherever o goes: o is what carries the backward pass to it.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, o: Tensor, message: Tensor, relay: Relay, name: str) -> Tensor:
        ctx.relay, ctx.name, ctx.like = relay, name, (message.numel(), message.dtype, message.device)
        relay.post(name, message)
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        n, what = ctx.relay.neighbours, f"the gradient of {ctx.relay.describe(ctx.name)}"
        return None, grad, n.expect(*ctx.like, n.rank + 1, what).wait(), None, None


class Message(NamedTuple):
    """The state of a memory, or the tail of the convolution ("conv"), of the sequences that need one across a cut.

    rows       [n] int64, indices of these among the cut's sequences.
    positions  tokens that each of them has read, [n].
    shapes     of the tensors in the message, by their names in `MemoryState.tensors`.
    mid_chunk  whether the anchors are among them. Where all are at the start of a chunk they equal the weights.
    """

    rows: Tensor
    positions: list[int]
    shapes: dict[str, tuple[int, ...]]
    mid_chunk: bool = False

    @property
    def numbers(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def pack(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors of these rows → [numbers]."""
        return torch.cat([tensors[name].flatten().to(dtype) for name in self.shapes])

    def unpack(self, message: Tensor) -> dict[str, Tensor]:
        parts = message.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


def conv_message(config: TNTConfig, rows: int) -> Message | None:
    """The last inputs of the convolution of so many sequences."""
    if not config.conv_kernel_size or config.conv_kernel_size == 1 or not rows:
        return None
    channels = 3 * config.num_heads * config.head_dim
    shapes = {CONV: (rows, config.conv_kernel_size - 1, channels)}
    return Message(torch.arange(rows), [0] * rows, shapes)


def state_message(
    config: TNTConfig, options: MemoryOptions, positions: Sequence[int], ended: Sequence[bool] | None = None
) -> Message | None:
    """What of a memory crosses a cut before which its sequences have read so many tokens; None: nothing.

    A memory at the end of its shard is about to be reset, so nothing of it need be known, but where its sequence has
    `ended`: it is not reset in this batch, and the cache keeps it as it is.
    """
    ended = ended or [False] * len(positions)
    length = options.shard_length
    needed = [i for i, p in enumerate(positions) if length is None or p % length or ended[i]]
    if not needed:
        return None
    positions = [positions[i] for i in needed]
    mid_chunk = any(p % options.chunk_size for p in positions)
    groups = ["weights", *["anchor"] * mid_chunk, *["momentum"] * config.use_momentum]
    shapes = {
        f"{group}.{name}": (len(needed), *shape)
        for group in groups for name, shape in fast_weight_shapes(config).items()
    }  # fmt: skip
    if options.qk_projection == "shard" or (options.qk_projection == "chunk" and mid_chunk):
        shapes["projection"] = (len(needed), config.num_heads, config.head_dim, config.head_dim)
    return Message(torch.tensor(needed), positions, shapes, mid_chunk)


class Relay:
    """What one layer of this rank gets from the rank before and hands on to the next one, in one call of the model.

    A recomputed layer (gradient checkpointing) gets what it got the first time, and hands on nothing.
    """

    def __init__(self, neighbours: Neighbours, part: Part, config: TNTConfig, layer: int, keeps_all: bool):
        self.neighbours, self.part, self.config, self.layer = neighbours, part, config, layer
        self.keeps_all = keeps_all
        self.starts: dict[str, list[int] | None] = {}
        self.incoming: dict[str, Message] | None = None
        self.outgoing: dict[str, Message] = {}
        self._coming: dict[str, Incoming] = {}
        self._received: dict[str, Tensor] = {}
        self._sent: set[str] = set()

    def open(
        self, x: Tensor, memories: Sequence[tuple[str, MemoryOptions]], cache: TNTCacheLayer | None, with_grad: bool
    ) -> None:
        """Begin the layer: know the messages, and begin to receive."""
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Every rank makes the same nodes of autograd, whether or not its own tensors require a gradient.
        self.anchor = torch.empty(0, device=x.device, requires_grad=with_grad)
        if self.incoming is not None:
            return
        self.starts = {name: _positions(cache, name) for name, _ in memories}
        self.incoming = self._messages(self.part.incoming, memories)
        self.outgoing = self._messages(self.part.outgoing, memories)
        n = self.neighbours
        for name, message in self.incoming.items():
            self._coming[name] = n.expect(message.numbers, self.dtype, x.device, n.rank - 1, self.describe(name))

    def _messages(self, cut: Cut | None, memories: Sequence[tuple[str, MemoryOptions]]) -> dict[str, Message]:
        """By name, in the order in which they are sent."""
        if cut is None:
            return {}
        messages = {CONV: conv_message(self.config, len(cut.tokens))}
        for name, options in memories:
            messages[name] = state_message(self.config, options, _positions_at(cut, self.starts[name]), cut.ended)
        return {name: message for name, message in messages.items() if message is not None}

    def describe(self, name: str) -> str:
        what = "the last inputs of the convolution" if name == CONV else f"the state of the memory {name}"
        return f"{what} of layer {self.layer}"

    # ------------------------------------------------------------------------------------------------------ receiving

    def fetch(self, name: str) -> Tensor:
        """The message of this name, waited for once."""
        if name not in self._received:
            self._received[name] = self._coming.pop(name).wait()
        return self._received[name].detach()

    def receive_tail(self, cached: Tensor | None) -> Tensor | None:
        """The convolution's last inputs before this part, [rows, K − 1, C]; None: zeros."""
        cut, message = self.part.incoming, self.incoming.get(CONV)
        if message is None:
            return _with_ghost(cached, self.part)
        received = message.unpack(Receive.apply(self.anchor, self, CONV))[CONV]
        rows = self.part.rows_of(cut)
        if len(rows) == self.part.rows:
            return received
        base = received.new_zeros(self.part.rows, *received.shape[1:])
        return base.index_copy(0, on_device(rows.tolist(), received), received)

    def receive_state(
        self, name: str, options: MemoryOptions, params: MemoryParams, cached: MemoryState | None
    ) -> MemoryState | None:
        """The state of a memory before this part, for each of its sequences; None: the learned initial one."""
        cut, message = self.part.incoming, self.incoming.get(name)
        if cut is None:
            return None if cached is None else self._extend(cached, options, params)
        if message is None and not self.keeps_all:
            return None
        rows = self.part.rows_of(cut)
        positions = torch.zeros(self.part.rows, dtype=torch.int64)
        positions[rows] = torch.tensor(_positions_at(cut, self.starts[name]), dtype=torch.int64)
        state = None
        if message is not None:
            state = self._unpack(message, Receive.apply(self.anchor, self, name), params, options)
        if message is None or len(message.rows) != self.part.rows:
            state = self._spread(state, None if message is None else rows[message.rows], options, params)
        return state._replace(position=positions)  # in the host's memory, so that nothing waits for the device

    def _unpack(self, message: Message, flat: Tensor, params: MemoryParams, options: MemoryOptions) -> MemoryState:
        tensors = message.unpack(flat)

        def group(name: str) -> FastWeights:
            return params.fast_weights._replace(
                **{key: tensors[f"{name}.{key}"] for key in fast_weight_shapes(self.config)}
            )

        weights = group("weights")
        projection = tensors.get("projection")
        if projection is None and options.qk_projection != "none":
            rows, H, D = len(message.rows), self.config.num_heads, self.config.head_dim
            projection = flat.new_zeros(rows, H, D, D)
        return MemoryState(
            weights, group("anchor") if message.mid_chunk else weights,
            group("momentum") if self.config.use_momentum else None, projection, torch.empty(0),
        )  # fmt: skip

    def _spread(
        self, state: MemoryState | None, rows: Tensor | None, options: MemoryOptions, params: MemoryParams
    ) -> MemoryState:
        """The states of some rows among initial ones."""
        base = self._initial(self.part.rows, options, params)
        if state is None:
            return base
        rows, ours = on_device(rows.tolist(), self.anchor), state.tensors()
        return MemoryState.from_tensors(
            {name: t if name == "position" else t.index_copy(0, rows, ours[name]) for name, t in base.tensors().items()}
        )

    def _extend(self, state: MemoryState, options: MemoryOptions, params: MemoryParams) -> MemoryState:
        """With an initial state for the ghost, if there is one."""
        if not self.part.has_ghost:
            return state
        ours, extra = state.tensors(), self._initial(1, options, params).tensors()
        return MemoryState.from_tensors({name: torch.cat([t, extra[name].to(t.dtype)]) for name, t in ours.items()})

    def _initial(self, rows: int, options: MemoryOptions, params: MemoryParams) -> MemoryState:
        return initial_memory_state(
            params, rows, with_momentum=self.config.use_momentum, with_projection=options.qk_projection != "none",
            dtype=self.dtype,
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- sending

    def hands_on(self, name: str) -> bool:
        """Whether the next rank needs the state of this memory, or the convolution's last inputs ("conv")."""
        return name in self.outgoing

    def post(self, name: str, message: Tensor) -> None:
        """Send once."""
        if name not in self._sent:
            self._sent.add(name)
            self.neighbours.send(message, self.neighbours.rank + 1, self.describe(name))

    def send_tail(self, o: Tensor, tail: Tensor | None) -> Tensor:
        """Hand on the last inputs of the convolution, [rows, K − 1, C]; returns o, see `HandOn`."""
        return self._send(CONV, o, {CONV: tail}) if self.hands_on(CONV) else o

    def send_state(self, name: str, o: Tensor, state: MemoryState | None) -> Tensor:
        """Hand on a memory's state; returns o, see `HandOn`."""
        return self._send(name, o, state.tensors()) if self.hands_on(name) else o

    def _send(self, name: str, o: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        message = self.outgoing[name]
        rows = self.part.rows_of(self.part.outgoing)[message.rows]
        if len(rows) != self.part.rows:
            rows = on_device(rows.tolist(), o)
            tensors = {key: tensors[key].index_select(0, rows) for key in message.shapes}
        return HandOn.apply(self.anchor, o, message.pack(tensors, self.dtype), self, name)

    def without_ghost(self, state: MemoryState | Tensor | None) -> MemoryState | Tensor | None:
        """The states, or the tails, of the part's own sequences."""
        if not self.part.has_ghost or state is None:
            return state
        rows = len(self.part.sequences)
        return state[:rows] if isinstance(state, Tensor) else state.map(lambda t: t[:rows])


def _with_ghost(cached: Tensor | None, part: Part) -> Tensor | None:
    if cached is None or not part.has_ghost:
        return cached
    return torch.cat([cached, cached.new_zeros(1, *cached.shape[1:])])


def _positions(cache: TNTCacheLayer | None, name: str) -> list[int] | None:
    """Tokens of each row that a memory in the cache has read; None without any."""
    if cache is None or name not in cache.memories:
        return None
    return cache.memories[name].position.tolist()


def _positions_at(cut: Cut, starts: list[int] | None) -> list[int]:
    """Tokens that each sequence of a cut has read there."""
    if starts is None:
        return cut.tokens
    return [starts[i] + tokens for i, tokens in zip(cut.sequences.tolist(), cut.tokens, strict=True)]
