"""Times of a part of a sequence on one device: a layer, apart from it its serial part, and embedding, head and loss.

All kernels of a training step are recorded, as eager torch launches them: of a layer that reads a whole row, and of one
that is the middle rank of three, which gets states and hands them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from recording import DTYPES, SHARED_LIMITS
from torch import Tensor, nn

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.block import TNTBlock
from modeling_tnt.context_parallel import boundary_bytes
from modeling_tnt.context_plan import plan_part
from modeling_tnt.context_relay import CONV, Relay
from modeling_tnt.kernels.fused.limits import assume_device
from modeling_tnt.train.bench.context_model import LayerTimes, PartTimes
from modeling_tnt.train.bench.context_trace import BEGIN, END, MIDDLE, THREE, NoNeighbours, Stamp, pass_times

from .cases import DTYPE
from .recording import Recording, record_calls
from .timing import Timing

PRESETS = ("tnt-150m", "titans-150m")
LENGTHS = tuple(2048 * 2**i for i in range(8))
ENDS_LENGTH = 8192  # logits of more tokens are large, and their time is in proportion


@dataclass(frozen=True)
class PartCase:
    """A training step of one layer of a preset, or (`ends`) of its embedding, head and loss, on a row of so many
    tokens; of a whole row, or (`middle`) of the middle rank's part of a row three times as long."""

    preset: str
    tokens: int
    middle: bool = False
    ends: bool = False

    @property
    def serial(self) -> list[str]:
        """The memories whose states cross a cut: the global one, or one that is never reset."""
        return [name for name in boundary_bytes(TNTConfig.from_preset(self.preset), self.tokens) if name != CONV]


@dataclass(frozen=True)
class PartRecording:
    """`passes`: the stamps of the forward and of the backward pass, whose clock counts the calls recorded so far."""

    case: PartCase
    recording: Recording
    passes: tuple[list[Stamp], list[Stamp]]

    def layer_times(self, timings: Sequence[Timing]) -> tuple[LayerTimes, LayerTimes]:
        """Of both passes, from the timings of its calls."""
        seconds = [0.0, *accumulate(timing.seconds for timing in timings)]
        timed = ([stamp._replace(at=seconds[stamp.at]) for stamp in stamps] for stamps in self.passes)
        return tuple(pass_times(stamps, self.case.serial) for stamps in timed)


def cases() -> Iterator[PartCase]:
    for preset in PRESETS:
        yield PartCase(preset, ENDS_LENGTH, ends=True)
        for tokens in LENGTHS:
            yield from (PartCase(preset, tokens), PartCase(preset, tokens, middle=True))


def record_part(case: PartCase, target: int) -> PartRecording:
    config = TNTConfig.from_preset(case.preset, kernel_backend="triton")
    if case.ends:
        model = _filled(TNTForCausalLM(config))
        model.model.layers = nn.ModuleList()
        ids = torch.zeros(1, case.tokens, dtype=torch.int64)
        return _record(case, lambda relay: model(input_ids=ids, labels=ids, use_cache=False).loss, target)
    block = _filled(TNTBlock(config))
    x = torch.zeros(1, case.tokens, config.hidden_size, requires_grad=True)
    return _record(case, lambda relay: block(x, relay=relay), target)


def part_times(
    recordings: Sequence[PartRecording], timings: Sequence[Sequence[Timing]], preset: str, middle: bool
) -> dict[int, PartTimes]:
    """By their tokens, of parts of whole rows or of the middle rank."""
    layers, ends = {}, (0.0, 0.0)
    for recording, mine in zip(recordings, timings, strict=True):
        case = recording.case
        if case.preset == preset and case.ends:
            ends = tuple(times.total / case.tokens for times in recording.layer_times(mine))
        elif case.preset == preset and case.middle == middle:
            layers[case.tokens] = recording.layer_times(mine)
    return {
        tokens: PartTimes(forward, tokens * ends[0], tokens * ends[1], backward)
        for tokens, (forward, backward) in layers.items()
    }


def _filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.01)  # much of it is made by torch.empty
    return module


def _record(case: PartCase, forward: Callable[[Relay | None], Tensor], target: int) -> PartRecording:
    """Forward and backward under autocast."""
    with assume_device(divmod(target, 10), SHARED_LIMITS[target]), record_calls(target, only_operators=False) as found:
        neighbours = NoNeighbours(MIDDLE, len(THREE), lambda: len(found.calls), {})
        relay = None
        if case.middle:
            shape = (1, len(THREE) * case.tokens)
            part = plan_part(None, shape, case.tokens, MIDDLE, len(THREE), keep_all=False)
            relay = Relay(neighbours, part, TNTConfig.from_preset(case.preset), layer=0, keeps_all=False)
        neighbours.stamp(BEGIN)
        with torch.autocast("cpu", DTYPES[DTYPE]):
            o = forward(relay)
        neighbours.stamp(END)
        first, neighbours.stamps = neighbours.stamps, []
        neighbours.stamp(BEGIN)
        o.backward(torch.zeros_like(o))
        neighbours.stamp(END)
    return PartRecording(case, found, (first, neighbours.stamps))
