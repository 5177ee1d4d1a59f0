"""One rank of a context-parallel group run alone: all that it does among others, with nobody to wait for.

What it waits for is there at once, and the times at which it asks for a state and sends one say how long its serial
parts are. The clock may be any that only moves forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.context_parallel import ContextParallel
from modeling_tnt.context_relay import Incoming, Neighbours

from .context_model import LayerTimes, PartTimes

FIRST, MIDDLE, LAST = THREE = range(3)  # of a group of three
BEGIN, WAIT, SEND, END = "begin", "wait", "send", "end"


class Stamp(NamedTuple):
    """When a layer's pass begins, a message is asked for or sent, or the last layer's pass ends."""

    kind: str
    at: float
    what: str = ""


class NoNeighbours(Neighbours):
    """Takes messages without sending them. What it waits for is what was last sent under the same name; or zeros, which
    a gradient may be, but no state should: so the first rank must run before the others, with the same `kept`."""

    def __init__(self, rank: int, size: int, clock: Callable[[], float], kept: dict[str, Tensor]):
        self.group, self.rank, self.size = None, rank, size
        self.clock, self.kept = clock, kept
        self.stamps: list[Stamp] = []
        self.reset_counts()

    def stamp(self, kind: str, what: str = "") -> None:
        self.stamps.append(Stamp(kind, self.clock(), what))

    def send(self, message: Tensor, rank: int, what: str) -> None:
        self.stamp(SEND, what)
        self.kept[what] = message.detach()

    def expect(self, numbers: int, dtype: torch.dtype, device: torch.device, rank: int, what: str) -> Incoming:
        message = self.kept.get(what)
        if message is None or message.numel() != numbers:
            message = torch.zeros(numbers, dtype=dtype, device=device)
        return Incoming(self, None, message.to(dtype).clone(), rank, what)

    def wait(self, work: dist.Work | None, rank: int, what: str) -> None:
        self.stamp(WAIT, what)

    def finish(self) -> None:
        pass


class RankAlone(ContextParallel):
    """How a model reads the part of one rank, without the others."""

    def __init__(self, config: TNTConfig, neighbours: NoNeighbours, part: int):
        self.group, self.config, self.part_multiple = None, config, part
        self.neighbours, self.rank, self.size = neighbours, neighbours.rank, neighbours.size
        self._said_uneven = True

    def check_same(self, what: str, *tensors: Tensor | None, numbers: Sequence[int] = ()) -> None:
        pass

    def sum_loss(self, loss: Tensor) -> Tensor:
        return loss


def trace_step(
    model: TNTForCausalLM,
    forward: Callable[[], Tensor],
    part: int,
    rank: int,
    clock: Callable[[], float],
    kept: dict[str, Tensor],
    names: Sequence[str],
) -> PartTimes:
    """Times of a training step of one rank of three, each of which reads a part of so many tokens.

    Args:
        forward: the loss of the model on rows of three parts.
        kept: see `NoNeighbours`.
        names: the memories whose states cross a cut, in order; every other message belongs to what is between them.
    """
    neighbours = NoNeighbours(rank, len(THREE), clock, kept)
    model.base_model._context_parallel = RankAlone(model.config, neighbours, part)
    try:
        with _watched(model, neighbours.stamp):
            began = clock()
            loss = forward()
            middle, first = clock(), neighbours.stamps
            neighbours.stamps = []
            loss.backward()
            ended, second = clock(), neighbours.stamps
    finally:
        model.disable_context_parallel()
    return PartTimes(
        pass_times(first, names), middle - began - _span(first), ended - middle - _span(second),
        pass_times(second, names[::-1]),
    )  # fmt: skip


def pass_times(stamps: Sequence[Stamp], names: Sequence[str]) -> LayerTimes:
    """The mean layer of a pass, from its BEGIN stamps and the END behind them.

    A serial part lasts from where its state is asked for to where the new one is sent. Of a first rank, which asks for
    none, it begins with the layer; of a last one, which sends none, it has no length.
    """
    begins = [i for i, stamp in enumerate(stamps) if stamp.kind == BEGIN]
    ends = [*begins[1:], len(stamps) - 1]
    layers = [_layer_times(stamps[i : j + 1], names) for i, j in zip(begins, ends, strict=True)]
    serial = tuple(map(_mean, zip(*(times.serial for times in layers), strict=True)))
    return LayerTimes(_mean([t.before for t in layers]), serial, _mean([t.after for t in layers]))


def _layer_times(stamps: Sequence[Stamp], names: Sequence[str]) -> LayerTimes:
    found = {(stamp.kind, name): stamp.at for stamp in stamps for name in names if f"memory {name} of" in stamp.what}
    point = begin = stamps[0].at
    serial = []
    for i, name in enumerate(names):
        if i == 0:
            point = begin = found.get((WAIT, name), point)
        stop = found.get((SEND, name), point)
        serial.append(stop - point)
        point = stop
    return LayerTimes(begin - stamps[0].at, tuple(serial), stamps[-1].at - point)


@contextmanager
def _watched(model: TNTForCausalLM, stamp: Callable[[str], None]) -> Iterator[None]:
    """Inside, BEGIN of each layer is stamped in both passes, and END of the last one."""
    layers = model.base_model.layers
    handles: list[RemovableHandle] = []

    def begin(module: Any, args: tuple) -> None:
        if module is layers[0]:
            args[0].register_hook(lambda grad: stamp(END))
        stamp(BEGIN)

    def end(module: Any, args: tuple, output: Tensor) -> None:
        output.register_hook(lambda grad: stamp(BEGIN))
        if module is layers[-1]:
            stamp(END)

    for layer in layers:
        handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _span(stamps: Sequence[Stamp]) -> float:
    return stamps[-1].at - stamps[0].at


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
