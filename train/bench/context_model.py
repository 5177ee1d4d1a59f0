"""A model of context parallel: how long a training step takes whose sequence is cut over ranks, and who waits.

A rank is a program: work of so many seconds, messages that it sends, messages that it cannot go on without, and one
meeting of all, the sum of the loss. `simulate` runs the programs of all ranks against each other; nothing is put into
a formula. In a layer a rank has work before its serial parts, which are the memories whose state crosses the cut, and
work behind them. A serial part begins when the rank's own earlier work is done and the state of the rank before is
there, and its own state leaves as soon as it ends; in the backward pass gradients go the other way.

What is left out: the convolution's inputs, a few kilobytes that are sent before anything waits; the mean of the
gradients over the ranks, which data parallel training has, too; and how much memory a device has.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple


class Link(NamedTuple):
    """Between two ranks: seconds that a message takes at the least, and bytes a second."""

    latency: float
    bandwidth: float


class Work(NamedTuple):
    """Seconds that a rank computes while it has a core of its own."""

    seconds: float


class Send(NamedTuple):
    """A message to a rank, which goes on its way while the sender works on."""

    message: Hashable
    to: int
    size: int


class Receive(NamedTuple):
    """Wait until a message is there."""

    message: Hashable


class Meet(NamedTuple):
    """Wait until all ranks are here."""


Program = Sequence[Work | Send | Receive | Meet]


class LayerTimes(NamedTuple):
    """Seconds of one layer in one pass, in its order; `serial` has one entry for each state that crosses a cut."""

    before: float
    serial: tuple[float, ...]
    after: float

    @property
    def total(self) -> float:
        return self.before + sum(self.serial) + self.after


class PartTimes(NamedTuple):
    """Seconds of one process over a part of a sequence, in both passes; `ends`: embedding, head and loss."""

    forward: LayerTimes
    ends_forward: float
    ends_backward: float
    backward: LayerTimes

    def total(self, layers: int) -> float:
        return layers * (self.forward.total + self.backward.total) + self.ends_forward + self.ends_backward


@dataclass(frozen=True)
class Simulation:
    """Seconds until the last rank is done; and of each rank: of its work, of waiting for states, and at the meeting."""

    seconds: float
    worked: tuple[float, ...]
    received: tuple[float, ...]
    met: tuple[float, ...]

    @property
    def mean_wait(self) -> float:
        """The mean rank's waiting for states as a share of the step."""
        return sum(self.received) / len(self.received) / self.seconds

    @property
    def idle(self) -> float:
        """The share of the step in which the mean rank has no work; of ranks that have a device each."""
        return 1 - sum(self.worked) / len(self.worked) / self.seconds

    @property
    def longest_wait(self) -> float:
        """The same of the rank that waits most."""
        return max(self.received) / self.seconds


def rank_program(times: PartTimes, rank: int, ranks: int, layers: int, sizes: Sequence[int]) -> Program:
    """What a rank does in a step; sizes: bytes of the state of each serial part of the forward pass."""
    steps: list[Work | Send | Receive | Meet] = []

    def add_layer(layer: int, times: LayerTimes, sizes: Sequence[int], sender: int, receiver: int) -> None:
        steps.append(Work(times.before))
        for i, (seconds, size) in enumerate(zip(times.serial, sizes, strict=True)):
            if 0 <= sender < ranks:
                steps.append(Receive((sender, rank, layer, i)))
            steps.append(Work(seconds))
            if 0 <= receiver < ranks:
                steps.append(Send((rank, receiver, layer, i), receiver, size))
        steps.append(Work(times.after))

    for layer in range(layers):
        add_layer(layer, times.forward, sizes, rank - 1, rank + 1)
    steps += [Work(times.ends_forward), Meet(), Work(times.ends_backward)]
    for layer in reversed(range(layers)):
        add_layer(layer, times.backward, sizes[::-1], rank + 1, rank - 1)
    return steps


def simulate_step(
    parts: Sequence[PartTimes], layers: int, sizes: Sequence[int], link: Link, speeds: Sequence[float] = ()
) -> Simulation:
    """A training step over as many ranks as there are parts; see `rank_program` and `simulate`."""
    programs = [rank_program(times, rank, len(parts), layers, sizes) for rank, times in enumerate(parts)]
    return simulate(programs, link, speeds)


def simulate(programs: Sequence[Program], link: Link, speeds: Sequence[float] = ()) -> Simulation:
    """Run the programs of all ranks against each other.

    Args:
        link: between any two ranks and in each direction one of its own, on which messages follow each other.
        speeds: of each of 1, 2, … ranks that compute at the same time, where a rank that computes alone has 1: less
            than 1 where cores share caches and memory. More ranks than there are entries share what those have
            together. Empty: every rank has a device of its own.

    Raises:
        ValueError: for a rank that waits for what nobody sends.
    """
    return _Simulator(programs, link, speeds).run()


@dataclass
class _Rank:
    program: Program
    position: int = 0
    waits_since: float = 0.0
    received: float = 0.0
    met: float = 0.0
    done: float | None = None


@dataclass
class _Simulator:
    """Ranks that compute at once are equally fast: `served` is the work that each has had that began at second 0, so
    that the one whose work ends first stands at the top of `working`, whatever the speed is until then."""

    programs: Sequence[Program]
    link: Link
    speeds: Sequence[float]
    now: float = 0.0
    served: float = 0.0
    working: list[tuple[float, int]] = field(default_factory=list)
    on_the_way: list[tuple[float, int, Hashable]] = field(default_factory=list)
    arrived: set[Hashable] = field(default_factory=set)
    waiting: dict[Hashable, int] = field(default_factory=dict)
    at_meeting: list[int] = field(default_factory=list)
    link_free: dict[tuple[int, int], float] = field(default_factory=dict)
    order: Iterator[int] = field(default_factory=count)  # of messages that arrive at the same time

    def run(self) -> Simulation:
        self.ranks = [_Rank(program) for program in self.programs]
        for rank in range(len(self.ranks)):
            self._go_on(rank)
        while self.working or self.on_the_way:
            index = self._next()
            if index is not None:
                self._go_on(index)
        stuck = [i for i, rank in enumerate(self.ranks) if rank.done is None]
        if stuck:
            raise ValueError(f"programs must end, but ranks {stuck} wait for what nobody sends; check who sends what")
        worked = tuple(sum(step.seconds for step in p if isinstance(step, Work)) for p in self.programs)
        received, met = (tuple(getattr(rank, name) for rank in self.ranks) for name in ("received", "met"))
        return Simulation(max(rank.done for rank in self.ranks), worked, received, met)

    def _next(self) -> int | None:
        """Turn the clock to what happens next; the rank that can go on then, if there is one."""
        speed = self._speed()
        ends = self.now + (self.working[0][0] - self.served) / speed if self.working else float("inf")
        if not self.on_the_way or ends <= self.on_the_way[0][0]:
            self.now = ends
            self.served, index = heapq.heappop(self.working)
            return index
        arrives, _, message = heapq.heappop(self.on_the_way)
        self.served += (arrives - self.now) * speed
        self.now = arrives
        self.arrived.add(message)
        index = self.waiting.pop(message, None)
        if index is not None:
            self.ranks[index].received += self.now - self.ranks[index].waits_since
        return index

    def _speed(self) -> float:
        active = len(self.working)
        if not self.speeds or not active:
            return 1.0
        known = min(active, len(self.speeds))
        return self.speeds[known - 1] * known / active

    def _go_on(self, index: int) -> None:
        """Take a rank from where it stands to its next work or wait."""
        rank = self.ranks[index]
        while rank.position < len(rank.program):
            step = rank.program[rank.position]
            if isinstance(step, Receive) and step.message not in self.arrived:
                self.waiting[step.message], rank.waits_since = index, self.now
                return
            rank.position += 1
            if isinstance(step, Work):
                heapq.heappush(self.working, (self.served + step.seconds, index))
                return
            if isinstance(step, Send):
                self._send(index, step)
            elif isinstance(step, Meet):
                self._meet(index)
                return
        rank.done = self.now

    def _send(self, index: int, step: Send) -> None:
        begins = max(self.now, self.link_free.get((index, step.to), 0.0))
        ends = self.link_free[index, step.to] = begins + step.size / self.link.bandwidth
        heapq.heappush(self.on_the_way, (ends + self.link.latency, next(self.order), step.message))

    def _meet(self, index: int) -> None:
        self.at_meeting.append(index)
        self.ranks[index].waits_since = self.now
        if len(self.at_meeting) == len(self.ranks):
            together, self.at_meeting = self.at_meeting, []
            for one in together:
                self.ranks[one].met += self.now - self.ranks[one].waits_since
                self._go_on(one)


# ------------------------------------------------------------------------------------------------ times of part lengths


@dataclass(frozen=True)
class PartTable:
    """Times of parts of some lengths, rising."""

    lengths: tuple[int, ...]
    times: tuple[PartTimes, ...]

    def at(self, length: int) -> PartTimes:
        """Of a part of any length from the shortest on: between two lengths on a straight line, and beyond the longest
        in proportion. Raises ValueError for a shorter one."""
        if length < self.lengths[0]:
            raise ValueError(f"length must be at least {self.lengths[0]}, the shortest part known, got {length}")
        if length >= self.lengths[-1]:
            return _mix(self.times[-1], self.times[-1], length / self.lengths[-1], 0.0)
        above = bisect_right(self.lengths, length)
        low, high = self.lengths[above - 1 : above + 1]
        share = (length - low) / (high - low)
        return _mix(self.times[above - 1], self.times[above], 1 - share, share)


def _mix(low: PartTimes, high: PartTimes, of_low: float, of_high: float) -> PartTimes:
    def mix(a: float, b: float) -> float:
        return of_low * a + of_high * b

    def mix_layers(a: LayerTimes, b: LayerTimes) -> LayerTimes:
        return LayerTimes(mix(a.before, b.before), tuple(map(mix, a.serial, b.serial)), mix(a.after, b.after))

    return PartTimes(
        mix_layers(low.forward, high.forward), mix(low.ends_forward, high.ends_forward),
        mix(low.ends_backward, high.ends_backward), mix_layers(low.backward, high.backward),
    )  # fmt: skip


def useful_ranks(speed_ups: Mapping[int, float], efficiency: float) -> int:
    """The largest number of ranks whose speed-up is at least this share of their number."""
    return max(ranks for ranks, speed_up in speed_ups.items() if speed_up >= efficiency * ranks)
