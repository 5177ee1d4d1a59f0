"""`tnt bench context-parallel`: training steps of one sequence over several processes, measured beside predicted.

A step is forward, cross-entropy of random tokens and backward; the mean of the gradients and the optimizer are left
out, as they are those of data parallel training. Numbers of ranks are timed in turns; one rank is the model as it is.
What the model of `context_model` predicts comes from each kind of rank run alone, with nobody to wait for (see
`context_trace`), from the link between two ranks, and from how much ranks that compute at once slow each other down.
Where there are fewer cores than ranks, the prediction shares them as the measurement does.

With --predict nothing is measured: `predicted_parts.json` has the times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.ticker import FuncFormatter

from modeling_tnt import TNTConfig
from modeling_tnt.context_parallel import boundary_bytes
from modeling_tnt.context_plan import part_columns, part_length
from modeling_tnt.context_relay import CONV
from modeling_tnt.kernels import choose_backend
from modeling_tnt.memory_layer import step_options

from ..common.machine import OtherProcesses, count_cpus, describe_machine
from ..common.pictures import COLORS, REFERENCE, count_tokens, make_y_logarithmic, picture, short_count
from ..common.timing import CANNOT_RUN, FAILED, GATE_FAILED, OK, OUT_OF_MEMORY, Outcome, Refused
from .arguments import ContextParallelBenchArguments
from .context_model import LayerTimes, Link, PartTimes, Simulation, simulate_step, useful_ranks
from .context_ranks import Ranks, Setup, StepFigures
from .context_trace import FIRST, LAST, MIDDLE
from .harness import Bench, run
from .measure import FEWEST_REPEATS, Timing
from .predicted_parts import load_parts, predicted_card
from .report import align, length_table, speed, spread
from .rows import ContextRow, name_with_backend

MOST_TURNS = 50
TRACE_REPEATS = 3
LOSS_LIMITS = {"autocast-bf16": 2e-2, "bf16": 5e-2, "fp32": 1e-4}  # of |loss − one rank's| / one rank's
USEFUL, GOOD = 0.5, 0.8  # efficiencies
LEGEND = """\
Waits: for states, the mean rank's and the longest, as a share of the step. Idle: all waiting, also for the loss and for
the last rank. What else keeps a rank from its share of the speed-up: short parts do not fill a device."""


def run_context_parallel(arguments: ContextParallelBenchArguments) -> int:
    return run(ContextPrediction if arguments.predict else ContextParallelBench, arguments)


class ContextParallelBench(Bench):
    """Steps over each number of ranks in turns, and what the model says of them."""

    row_class = ContextRow

    def __init__(self, args: ContextParallelBenchArguments):
        super().__init__(args)
        self.machine = f"{describe_machine(self.device, args.threads)} a rank"
        self.configs = {backend: args.tnt_config(backend) for backend in args.backends}
        self.cores = max(1, count_cpus() // args.threads) if args.device == "cpu" else None
        self.ranks: Ranks | None = None
        self.link = Link(0.0, float("inf"))

    @property
    def failed(self) -> bool:
        return self._lost is not None

    @property
    def threads(self) -> int:
        return self.args.threads * max(self.args.ranks) if self.args.device == "cpu" else 1

    def helper_seconds(self) -> float:
        return 0.0 if self.ranks is None else self.ranks.cpu_seconds()

    def rows(self) -> Iterator[ContextRow]:
        try:
            for backend, length in product(self.args.backends, self.args.seq_lens):
                outcome = self.attempt(partial(self._measure, backend, length))
                if outcome.status in (FAILED, OUT_OF_MEMORY):
                    self._lost = outcome.reason  # with the ranks
                for ranks in self.args.ranks:
                    yield self._row(backend, length, ranks, outcome)
        finally:
            if self.ranks is not None:
                self.ranks.close()

    def _row(self, backend: str, length: int, ranks: int, outcome: Outcome) -> ContextRow:
        args = self.args
        outcome = outcome._replace(value=outcome.value[ranks]) if outcome.status == OK else outcome
        return self.row(
            outcome, contender=name_with_backend(_count_ranks(ranks), backend, args.backends), length=length,
            batch=args.batch_size, dtype=args.precision, ranks=ranks, threads=args.threads, cores=self.cores,
            preset=args.preset, backend=self._chosen(backend),
            **describe_cut(self.configs[backend], length, ranks, args),
        )  # fmt: skip

    def _chosen(self, backend: str) -> str:
        return choose_backend(self.device.type).name if backend == "auto" else backend

    # ----------------------------------------------------------------------------------------------------- measurements

    def _start(self) -> Ranks:
        args = self.args
        if self.ranks is None:
            self.ranks = Ranks(
                Setup(
                    self.configs, max(args.ranks), args.device, args.threads, args.precision, args.batch_size,
                    args.seed, args.rank_timeout,
                )
            )  # fmt: skip
            self.ranks.start()
            if max(args.ranks) > 1:
                self.link = self.ranks.link()
        return self.ranks

    def _measure(self, backend: str, length: int) -> dict[int, dict[str, Any]]:
        """The fields of a row for each number of ranks."""
        processes, others = self._start(), OtherProcesses(self.helper_seconds)
        steps = self._step_in_turns(processes, backend, length)
        tokens, busy = self.args.batch_size * length, others.cpus()
        measured = {ranks: _summarize(turns, tokens, busy) for ranks, turns in steps.items()}
        self._check_losses({ranks: turns[0][0].loss for ranks, turns in steps.items()})
        alone = measured[1]["ms_median"]
        for ranks, fields in measured.items():
            speed_up = alone / fields["ms_median"]
            fields |= {"speed_up": speed_up, "efficiency": speed_up / ranks}
            if ranks > 1:
                fields |= self._predict(backend, length, ranks, alone, fields["ms_median"])
        return measured

    def _step_in_turns(self, processes: Ranks, backend: str, length: int) -> dict[int, list[list[StepFigures]]]:
        """What each rank says of each step, by the number of ranks; the first steps are not kept."""
        counts = self.args.ranks
        for count in counts:
            processes.step(count, backend, length)
        turns: dict[int, list[list[StepFigures]]] = {count: [] for count in counts}
        until = time.monotonic() + self.args.case_seconds * len(counts)
        while len(turns[1]) < FEWEST_REPEATS or (time.monotonic() < until and len(turns[1]) < MOST_TURNS):
            for count in counts:
                turns[count].append(processes.step(count, backend, length))
        return turns

    def _check_losses(self, losses: dict[int, float]) -> None:
        for ranks, loss in losses.items():
            if not abs(loss - losses[1]) <= LOSS_LIMITS[self.args.precision] * abs(losses[1]):  # not so for NaN
                raise Refused(GATE_FAILED, f"the loss is {loss} over {_count_ranks(ranks)} and {losses[1]} over one")

    def _predict(self, backend: str, length: int, ranks: int, alone: float, measured: float) -> dict[str, Any]:
        config = self.configs[backend]
        part = part_length(length, ranks, step_options(config), None)
        sizes = state_bytes(config, part, self.args.batch_size)
        known: dict[tuple[int, int], PartTimes] = {}
        parts = []
        for rank in range(ranks):
            tokens, kind = len(part_columns(length, part, rank)), _kind_of(rank, ranks)
            if tokens and (tokens, kind) not in known:
                known[tokens, kind] = self.ranks.trace(1, backend, tokens, kind, list(sizes), TRACE_REPEATS)[0]
            parts.append(known[tokens, kind] if tokens else _idle(len(sizes)))
        speeds = self._measure_speeds(backend, part, ranks, list(sizes), known[part, FIRST])
        simulation = simulate_step(parts, config.num_hidden_layers, list(sizes.values()), self.link, speeds)
        return _predicted_fields(simulation, alone / 1e3) | {"ratio": measured / 1e3 / simulation.seconds}

    def _measure_speeds(
        self, backend: str, part: int, ranks: int, names: Sequence[str], alone: PartTimes
    ) -> tuple[float, ...]:
        """See `simulate`: of ranks that read parts at the same time, as many as there are cores or ranks."""
        if self.cores is None:
            return ()
        count = min(ranks, self.cores)
        if count == 1:
            return (1.0,)
        layers = self.configs[backend].num_hidden_layers
        together = self.ranks.trace(count, backend, part, FIRST, names, TRACE_REPEATS)
        slowest = alone.total(layers) / mean(times.total(layers) for times in together)
        return tuple(1 + (slowest - 1) * i / (count - 1) for i in range(count))

    # ----------------------------------------------------------------------------------------------------------- report

    def facts(self) -> list[str]:
        args = self.args
        where = "NCCL, a GPU each" if self.cores is None else f"gloo, threads of each and of one alone: {args.threads}"
        return [
            f"model     {args.preset}, backend {', '.join(map(self._chosen, args.backends))}",
            f"ranks     {' '.join(map(str, args.ranks))}: {where}",
            f"steps     forward and backward of {args.batch_size} rows of random tokens, {args.precision}",
        ]

    def line(self, row: ContextRow) -> str:
        return f"{row.contender} T={row.length}: {speed(row)}"

    def tables(self, rows: Sequence[ContextRow]) -> list[str]:
        measured = [row for row in rows if row.status == OK]
        parts = [f"tokens/s\n{length_table(rows)}", f"step, ms\n{length_table(rows, partial(spread, digits=4))}"]
        return [*parts, f"measured\n{measured_table(measured)}"] if measured else parts

    def conclusions(self, rows: Sequence[ContextRow]) -> list[str]:
        shared = [row for row in rows if row.status == OK and row.ranks > 1]
        if not shared:
            return ["measured beside predicted: no step of several ranks was measured"]
        link = (
            f"link between two ranks: {1e6 * self.link.latency:.0f} µs, {self.link.bandwidth / 1e9:.2f} GB/s, measured"
        )
        return [f"measured beside predicted\n{comparison_table(shared)}\n{link}", self._describe_cores(shared)]

    def _describe_cores(self, rows: Sequence[ContextRow]) -> str:
        crowded = sorted({row.ranks for row in rows if row.cores is not None and row.ranks > row.cores})
        if not crowded:
            return ""
        counts = " and ".join(map(str, crowded))
        return (
            f"oversubscribed: {counts} ranks share {self.cores} cores, and no more than {self.cores} compute at once, "
            "in the prediction as here; their speed-up says nothing of as many devices"
        )

    def draw(self, path: Path, rows: Sequence[ContextRow]) -> None:
        save_speed_up_plot(path, rows, f"Context parallel: {self.args.preset}, {self.args.precision}, {self.machine}")


class ContextPrediction(Bench):
    """Steps over devices that are not there."""

    row_class = ContextRow

    def __init__(self, args: ContextParallelBenchArguments):
        super().__init__(args)
        self.config, self.parts, self.card = args.tnt_config("auto"), load_parts(args.preset), predicted_card()
        self.shortest = self.parts.middle.lengths[0]
        self.machine = f"{self.card}, not measured"
        self.link = Link(args.link_microseconds / 1e6, args.link_gigabytes * 1e9)

    def rows(self) -> Iterator[ContextRow]:
        for length in self.args.seq_lens:
            for ranks in self.args.ranks or self._doublings(length):
                outcome = self.attempt(partial(self._predict, length, ranks))
                yield self.row(
                    outcome, contender=_count_ranks(ranks), length=length, batch=1, dtype="bf16", ranks=ranks,
                    preset=self.args.preset, backend="triton", source="predicted",
                    **describe_cut(self.config, length, ranks, self.args),
                )  # fmt: skip

    def _doublings(self, length: int) -> list[int]:
        """Powers of two, as long as each rank has a part of at least the shortest length, a global chunk of TNT's."""
        most = length // self.shortest
        return [2**i for i in range(most.bit_length())]

    def _predict(self, length: int, ranks: int) -> dict[str, Any]:
        layers, part = self.config.num_hidden_layers, part_length(length, ranks, step_options(self.config), None)
        if part % self.shortest:
            raise Refused(CANNOT_RUN, f"parts of {part} tokens are not predicted, only multiples of {self.shortest}")
        alone, sizes = self.parts.whole.at(length).total(layers), state_bytes(self.config, part, 1)
        if ranks == 1:
            simulation = Simulation(alone, (alone,), (0.0,), (0.0,))
        else:
            columns = [len(part_columns(length, part, rank)) for rank in range(ranks)]
            parts = [self.parts.middle.at(tokens) if tokens else _idle(len(sizes)) for tokens in columns]
            simulation = simulate_step(parts, layers, list(sizes.values()), self.link)
        fields = _predicted_fields(simulation, alone)
        return fields | {"efficiency": fields["predicted_speed_up"] / ranks, "predicted_idle": simulation.idle}

    # ----------------------------------------------------------------------------------------------------------- report

    def describe(self) -> str:
        args = self.args
        return "\n".join([
            f"predicted for {self.card} from its kernels' machine code, not measured and not calibrated: ±40%, ratios "
            "±20%",
            f"model     {args.preset}, one row, bf16 under autocast, forward and backward",
            f"link      {args.link_microseconds:g} µs and {args.link_gigabytes:g} GB/s between any two, assumed",
            "baseline  one device of the same kind, as if it had the memory for the whole row",
            f"results   {args.output_dir}",
        ])  # fmt: skip

    def describe_load(self, cpus: float | None, rows: Sequence[ContextRow] = ()) -> str:
        return ""

    def line(self, row: ContextRow) -> str:
        times = f"{row.predicted_speed_up:.2f} times as fast" if row.status == OK else row.status
        return f"{row.contender} T={row.length}: {times}"

    def tables(self, rows: Sequence[ContextRow]) -> list[str]:
        done = [row for row in rows if row.status == OK]
        lengths = list(dict.fromkeys(row.length for row in done))
        return [
            f"predicted, {length:,} tokens\n{prediction_table([row for row in done if row.length == length])}"
            for length in lengths
        ]

    def conclusions(self, rows: Sequence[ContextRow]) -> list[str]:
        return [summarize_useful_ranks([row for row in rows if row.status == OK])]

    def draw(self, path: Path, rows: Sequence[ContextRow]) -> None:
        save_speed_up_plot(path, rows, f"Context parallel, predicted: {self.args.preset}, {self.card}")


# ------------------------------------------------------------------------------------------------------------- figures


def describe_cut(config: TNTConfig, length: int, ranks: int, args: ContextParallelBenchArguments) -> dict[str, int]:
    """The longest part, and the bytes that cross the border behind the first one in all layers and both passes."""
    part = min(length, part_length(length, ranks, step_options(config), None))
    crossing = sum(boundary_bytes(config, part, args.batch_size).values()) if part < length else 0
    return {"longest_part": part, "boundary_bytes": 2 * config.num_hidden_layers * crossing}


def state_bytes(config: TNTConfig, position: int, rows: int) -> dict[str, int]:
    """Of the states that a rank cannot go on without, by the memory's name."""
    return {name: size for name, size in boundary_bytes(config, position, rows).items() if name != CONV}


def _kind_of(rank: int, ranks: int) -> int:
    return FIRST if rank == 0 else LAST if rank == ranks - 1 else MIDDLE


def _idle(states: int) -> PartTimes:
    """Of a rank without a token, which hands on what it gets."""
    nothing = LayerTimes(0.0, (0.0,) * states, 0.0)
    return PartTimes(nothing, 0.0, 0.0, nothing)


def _summarize(turns: Sequence[Sequence[StepFigures]], tokens: int, others: float | None) -> dict[str, Any]:
    """The fields of a row: a step lasts until its last rank is done."""
    seconds = [max(figures.seconds for figures in turn) for turn in turns]
    waits = [[figures.waited_seconds / s for figures in turn] for turn, s in zip(turns, seconds, strict=True)]
    return Timing.of(seconds, None, cpus_used_by_others=others).fields(tokens) | {
        "sent_bytes_per_token": sum(figures.sent_bytes for figures in turns[0]) / tokens,
        "wait_mean": median(map(mean, waits)),
        "wait_longest": median(map(max, waits)),
    }


def _predicted_fields(simulation: Simulation, alone: float) -> dict[str, Any]:
    return {
        "predicted_ms": 1e3 * simulation.seconds,
        "predicted_speed_up": alone / simulation.seconds,
        "predicted_wait_mean": simulation.mean_wait,
        "predicted_wait_longest": simulation.longest_wait,
    }


# -------------------------------------------------------------------------------------------------------------- report


def measured_table(rows: Sequence[ContextRow]) -> str:
    head = ["", "tokens in a row", "a rank", "tokens/s", "speed-up", "a rank", "bytes a token", "waits", "longest wait"]
    lines = [
        [row.name, str(row.length), str(row.longest_part), speed(row), f"{row.speed_up:.2f}", f"{row.efficiency:.0%}",
         f"{row.sent_bytes_per_token:.1f}", f"{row.wait_mean:.1%}", f"{row.wait_longest:.1%}"]
        for row in rows
    ]  # fmt: skip
    return align([head, *lines])


def comparison_table(rows: Sequence[ContextRow]) -> str:
    head = ["", "tokens in a row", "ms", "predicted", "ratio", "speed-up", "predicted", "longest wait", "predicted"]
    lines = [
        [row.name, str(row.length), f"{row.ms_median:.4g}", f"{row.predicted_ms:.4g}", f"{row.ratio:.2f}",
         f"{row.speed_up:.2f}", f"{row.predicted_speed_up:.2f}", f"{row.wait_longest:.1%}",
         f"{row.predicted_wait_longest:.1%}"]
        for row in rows
    ]  # fmt: skip
    return align([head, *lines])


def prediction_table(rows: Sequence[ContextRow]) -> str:
    head = [
        "ranks",
        "tokens a rank",
        "step, ms",
        "speed-up",
        "a rank",
        "waits",
        "longest wait",
        "idle",
        "MB over a cut",
    ]
    lines = [
        [str(row.ranks), str(row.longest_part), f"{row.predicted_ms:.4g}", f"{row.predicted_speed_up:.2f}",
         f"{row.efficiency:.0%}", f"{row.predicted_wait_mean:.1%}", f"{row.predicted_wait_longest:.1%}",
         f"{row.predicted_idle:.1%}", f"{row.boundary_bytes / 1e6:.1f}"]
        for row in rows
    ]  # fmt: skip
    return align([head, *lines])


def summarize_useful_ranks(rows: Sequence[ContextRow]) -> str:
    """The largest numbers of ranks that make a step at least GOOD and USEFUL times their number as fast."""
    lines = [["tokens in a row", f"efficiency of {GOOD:.0%}", f"{USEFUL:.0%}: largest useful", "step then, ms"]]
    for length in dict.fromkeys(row.length for row in rows):
        mine = {row.ranks: row for row in rows if row.length == length}
        speed_ups = {1: 1.0} | {ranks: row.predicted_speed_up for ranks, row in mine.items()}
        good, useful = (useful_ranks(speed_ups, share) for share in (GOOD, USEFUL))
        ms = f"{mine[useful].predicted_ms:.4g}" if useful in mine else ""
        lines.append([f"{length:,}", str(good), str(useful), ms])
    return f"largest number of ranks, predicted\n{align(lines)}\n{LEGEND}"


def save_speed_up_plot(path: Path, rows: Sequence[ContextRow], title: str) -> None:
    """A PNG of the speed-up over the number of ranks, a line for each length and backend; predictions are dashed."""
    done = [row for row in rows if row.status == OK]
    series = list(dict.fromkeys((row.length, row.backend) for row in done))
    several = len({backend for _, backend in series}) > 1
    with picture(path, title, height=4.5) as figure:
        axes = figure.subplots()
        for i, (length, backend) in enumerate(series):
            mine = sorted((r for r in done if (r.length, r.backend) == (length, backend)), key=lambda row: row.ranks)
            label, color = short_count(length) + (f", {backend}" if several else ""), COLORS[i % len(COLORS)]
            for style, name, what in (("-", "speed_up", ""), ("--", "predicted_speed_up", ", predicted")):
                points = [(row.ranks, getattr(row, name)) for row in mine if getattr(row, name) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, marker="o", label=label + what)
        ranks = sorted({row.ranks for row in done})
        if ranks:
            axes.plot(ranks, ranks, **REFERENCE, label="as many times as fast")
        count_tokens(axes, ranks)
        make_y_logarithmic(axes, FuncFormatter(lambda number, _: f"{number:g}"))
        axes.set(xlabel="ranks", ylabel="speed-up")


def _count_ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"
