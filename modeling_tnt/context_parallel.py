"""Context parallel: one sequence over several devices (TNT, arXiv 2511.07343, section 4).

Local memories are reset at every shard, so shards need nothing of each other; only the global memory passes a state on.
`model.enable_context_parallel(group)` is all that a user calls: `ContextParallel` knows the group, `context_plan` what
each rank reads, `context_relay` what it passes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache
from transformers.utils import logging

from .configuration import TNTConfig
from .context_plan import Part, part_columns, part_length, plan_part
from .context_relay import CONV, ContextParallelError, Neighbours, Relay, conv_message, explained, state_message
from .memory_layer import step_options
from .packing import Packing

__all__ = ["ContextParallel", "ContextParallelError", "boundary_bytes"]

logger = logging.get_logger(__name__)

# Said once a model: a rank with that much more than its share keeps the others waiting.
_UNEVEN = 1.5


class ContextParallel:
    """How a model shares out sequences over a process group.

    group, rank, size  the processes that hold a part each, and the place of this one among them: rank 0 the first part.
    sent_bytes         payload that this rank has sent to its neighbours: states of memories, last inputs of
                       convolutions, and the gradients of what it got.
    waited_seconds     time in which the host was blocked by what had not come yet.
    """

    def __init__(self, group: dist.ProcessGroup, config: TNTConfig, part_multiple: int | None):
        self.group, self.config, self.part_multiple = group, config, part_multiple
        self.neighbours = Neighbours(group)
        self.rank, self.size = self.neighbours.rank, self.neighbours.size
        self._said_uneven = False

    def __deepcopy__(self, memo: dict) -> ContextParallel:
        return self  # a copy of a model belongs to the same processes

    @property
    def sent_bytes(self) -> int:
        return self.neighbours.sent_bytes

    @property
    def waited_seconds(self) -> float:
        return self.neighbours.waited_seconds

    def reset_counts(self) -> None:
        """Set sent_bytes and waited_seconds to zero."""
        self.neighbours.reset_counts()

    def columns(self, length: int, rank: int | None = None) -> range:
        """The columns of rows of `length` that a rank, this one by default, reads."""
        part = part_length(length, self.size, step_options(self.config), self.part_multiple)
        return part_columns(length, part, self.rank if rank is None else rank)

    def plan(self, whole: Packing | None, batch_shape: tuple[int, int], keep_all: bool) -> Part:
        """This rank's part of a batch whose packing, in the host's memory, is `whole`; see `plan_part`."""
        part = part_length(batch_shape[1], self.size, step_options(self.config), self.part_multiple)
        self._report_uneven(whole, batch_shape, part)
        return plan_part(whole, batch_shape, part, self.rank, self.size, keep_all)

    def relays(self, part: Part, layers: int, keep_all: bool) -> list[Relay]:
        """One for each layer, for one call."""
        self.neighbours.finish()
        return [Relay(self.neighbours, part, self.config, i, keep_all) for i in range(layers)]

    def check_same(self, what: str, *tensors: Tensor | None, numbers: Sequence[int] = ()) -> None:
        """Raise ValueError in every rank unless all have been given the same.

        Compared are shapes, sums of integers that depend on their places, and `numbers`.
        """
        given = next(t for t in tensors if t is not None)
        found = [torch.tensor([*numbers, *_shapes(tensors)], device=given.device)]
        found += [_checksum(t).view(1).to(given.device) for t in tensors if t is not None]
        own = torch.cat(found)
        everywhere = self._gather(torch.stack([own.new_tensor(own.numel()), _checksum(own)]))
        if all(torch.equal(theirs, everywhere[0]) for theirs in everywhere):
            return
        differing = [rank for rank, theirs in enumerate(everywhere) if not torch.equal(theirs, everywhere[0])]
        raise ValueError(
            f"{what} must be the same in every rank of the context-parallel group, got others in rank "
            f"{', '.join(map(str, differing))} than in rank 0; give each rank the same whole rows (the model takes its "
            "part of them): shard data over data-parallel groups only"
        )

    def sum_loss(self, loss: Tensor) -> Tensor:
        """The sum of each rank's share of a loss, in every rank, with gradients `size` times as large, so that their
        mean over the ranks is that of the whole."""
        return _SumOverRanks.apply(loss, self.group, self.size)

    def share_cache(self, cache: Cache) -> None:
        """Give every rank the states of the last one, which has read to the end."""
        last = dist.get_global_rank(self.group, self.size - 1)

        def from_last(t: Tensor) -> Tensor:
            t = t.clone(memory_format=torch.contiguous_format)
            with explained(self.group, "get the states of the last rank"):
                dist.broadcast(t, src=last, group=self.group)
            return t

        cache.layers = [layer.map(from_last) for layer in cache.layers]

    def _gather(self, own: Tensor) -> list[Tensor]:
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        with explained(self.group, "compare its batch with that of the others"):
            dist.all_gather(everywhere, own, group=self.group)
        return everywhere

    def _report_uneven(self, whole: Packing | None, batch_shape: tuple[int, int], part: int) -> None:
        """Say once how unevenly the tokens lie."""
        if self._said_uneven or self.rank != 0:
            return
        batch, length = batch_shape
        parts = [part_columns(length, part, rank) for rank in range(self.size)]
        if whole is None or whole.active is None:
            tokens = [batch * len(columns) for columns in parts]
        else:
            tokens = [int(whole.active[:, columns.start : columns.stop].sum()) for columns in parts]
        mean = sum(tokens) / self.size
        if mean and max(tokens) > _UNEVEN * mean:
            self._said_uneven = True
            logger.warning(
                f"context parallel: the ranks read {', '.join(map(str, tokens))} tokens of a batch of {batch} rows of "
                f"{length}, and all wait for the one with the most; fewer ranks, longer rows or less padding waste less"
            )


def boundary_bytes(
    config: TNTConfig, position: int, rows: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Bytes that go from one rank to the next in each layer of a forward pass; the backward pass sends as many back.

    Args:
        position: tokens of each sequence before the cut.
        rows: sequences that go on across it.
        dtype: of the states, float32, or float64 for a model in float64.

    Returns:
        By message: "conv", "global", "local0", …; those that are sent.
    """
    options = step_options(config)
    names = ["global"] * (config.global_chunk_size is not None)
    names += [f"local{i}" for i in range(len(options) - len(names))]
    messages = {CONV: conv_message(config, rows)}
    messages |= {name: state_message(config, o, [position] * rows) for name, o in zip(names, options, strict=True)}
    return {name: m.numbers * dtype.itemsize for name, m in messages.items() if m is not None}


class ContextParallelMixin:
    """`enable_context_parallel` and its kin, of a model."""

    _context_parallel: ContextParallel | None = None

    @property
    def context_parallel(self) -> ContextParallel | None:
        """How sequences are shared out over processes, or None where each process reads whole ones."""
        return self.base_model._context_parallel

    def enable_context_parallel(
        self, group_or_mesh: dist.ProcessGroup | DeviceMesh, *, part_multiple: int | None = None
    ) -> None:
        """From now on each rank of a process group reads a part of every sequence, one after the other.

        Every rank gives `forward` the same whole batch, and takes its own columns, `context_parallel.columns(T)`, of
        every row. Logits and hidden states are those of these columns; `loss` is that of the whole batch. The *mean*
        over the ranks of each parameter's gradient is that of the whole batch, as with data parallelism, so that
        DistributedDataParallel and FSDP2 over all processes need nothing else; every rank must run the backward pass.
        Between neighbours go, in each layer, the state of the global memory, those of local memories only where a cut
        is not at the start of a shard, and the last inputs of the convolution: see `boundary_bytes`.

        A cache goes in and comes out whole and the same in every rank, without gradients only.

        Args:
            group_or_mesh: of torch.distributed, with gloo or NCCL: a process group, or a mesh with the one dimension,
                or with a dimension "cp" (as Accelerate's ParallelismConfig makes it).
            part_multiple: the length of each part but the last is a multiple of it. None: of whole shards and global
                chunks where that leaves no rank idle, or else of chunks, or of nothing.

        Raises:
            ValueError: torch.distributed is not initialised, this process is not in the group, or a mesh of several
                dimensions without "cp"; a part_multiple below 1.
            TypeError: another kind of group; or a model that cannot.
        """
        if self.config.has_attention:
            raise ValueError(
                f"layer_types={self.config.layer_types} with memory_as={self.config.memory_as!r} has attention, which "
                "sees tokens of other ranks: context parallel is for models of memories alone; train this one with "
                "data parallelism"
            )
        if part_multiple is not None and (isinstance(part_multiple, bool) or not isinstance(part_multiple, int)):
            raise TypeError(f"part_multiple must be an int or None, got {type(part_multiple).__name__}")
        if part_multiple is not None and part_multiple < 1:
            raise ValueError(f"part_multiple={part_multiple} must be at least 1 token; leave it out to have it chosen")
        self.disable_context_parallel()
        self.base_model._context_parallel = ContextParallel(_group_of(group_or_mesh), self.config, part_multiple)

    def disable_context_parallel(self) -> None:
        """From now on each process reads whole sequences. Waits until what this one has sent has been received."""
        if self.context_parallel is not None:
            self.context_parallel.neighbours.finish()  # a message that nobody keeps is lost
        self.base_model._context_parallel = None

    def train(self, mode: bool = True) -> Any:
        """As of any module. Raises ValueError where attention would be trained on rows that Trainer cuts in two."""
        if mode and self.config.has_attention:  # without, Trainer refuses by itself
            refuse_ring_attention()
        return super().train(mode)

    @contextmanager
    def pause_context_parallel(self) -> Iterator[None]:
        """Inside, each process reads whole sequences by itself."""
        base = self.base_model
        kept, base._context_parallel = base._context_parallel, None
        try:
            yield
        finally:
            base._context_parallel = kept


def refuse_ring_attention() -> None:
    """Raise ValueError where accelerate's ParallelismConfig shares rows out as attention would have them."""
    # Without accelerate there is none; and no message that it must be installed.
    accelerate = sys.modules.get("accelerate.state")
    config = None if accelerate is None else accelerate.AcceleratorState._shared_state.get("parallelism_config")
    if config is not None and config.cp_enabled:
        raise ValueError(
            f"accelerate's ParallelismConfig has cp_size={config.cp_size}, with which transformers' Trainer cuts rows "
            "for ring attention: each process gets two pieces, one from each end, and a memory reads from left to "
            "right; use cp_size=1 here, or tnt train, whose training.context_parallel it is, or a loop of your own "
            "with model.enable_context_parallel"
        )


def _group_of(group_or_mesh: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "context parallel needs several processes that know of each other; start them with accelerate launch or "
            "torchrun, and call torch.distributed.init_process_group (or make an Accelerator) first"
        )
    if isinstance(group_or_mesh, DeviceMesh):
        names = group_or_mesh.mesh_dim_names or ()
        if "cp" in names:
            return group_or_mesh["cp"].get_group()
        if group_or_mesh.ndim != 1:
            raise ValueError(
                f"group_or_mesh has the dimensions {names or group_or_mesh.ndim}, of which none is called cp; give the "
                "one over which sequences are cut, as mesh['name']"
            )
        return group_or_mesh.get_group()
    is_outside = group_or_mesh is dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives to those who are not in it
    if not is_outside and not isinstance(group_or_mesh, dist.ProcessGroup):
        raise TypeError(
            f"group_or_mesh must be a torch.distributed process group or DeviceMesh, got {type(group_or_mesh).__name__}"
        )
    if is_outside or dist.get_rank(group_or_mesh) < 0:
        raise ValueError(
            f"group_or_mesh must be a group that this process, {dist.get_rank()}, is in; give each process its own"
        )
    return group_or_mesh


def _shapes(tensors: Sequence[Tensor | None]) -> list[int]:
    return [n for t in tensors for n in ([-1] if t is None else [*t.shape, -2])]


def _checksum(t: Tensor) -> Tensor:
    """int64, of integers and their places; of floating-point numbers nothing: equal ones may differ by a rounding."""
    if t.is_floating_point():
        return torch.zeros((), dtype=torch.int64, device=t.device)
    flat = t.detach().flatten().long()
    return (flat * (torch.arange(flat.numel(), device=t.device) % 65521 + 1)).sum()


class _SumOverRanks(torch.autograd.Function):
    """The sum over a group; backwards `size` times the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.size = size
        total = x.detach().clone()
        with explained(group, "sum the loss over the ranks"):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.size, None, None
