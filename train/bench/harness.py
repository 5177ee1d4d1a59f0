"""One run of a benchmark: what is still begun, rows that are kept as they come, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ..common.machine import OtherProcesses, describe_machine, describe_others, describe_versions, look_around
from ..common.timing import NOT_RUN, OK, Deadline, DeviceLostError, Outcome, attempt, free_memory
from ..options import fail, to_mapping
from .arguments import BenchArguments
from .measure import Stopwatch, Work, expected_seconds
from .report import list_reasons
from .rows import Row, save_rows

TURNS = 5


class _Begun(NamedTuple):
    """A piece of work and the watch that times it."""

    work: Work
    watch: Stopwatch

    def finish(self) -> dict[str, Any]:
        return self.work.figures(self.watch.read())


class Bench:
    """A benchmark with resolved arguments. A subclass says what is measured and what is said of it."""

    row_class: ClassVar[type[Row]]

    def __init__(self, args: Any):
        self.args, self.device = args, torch.device(args.device)
        self.machine, self.versions = describe_machine(self.device), describe_versions()
        self.deadline = Deadline(args.time_limit)
        self._lost: str | None = None
        self._earlier: dict[Hashable, tuple[int, float]] = {}

    # ---------------------------------------------------------------------------------------------- of a subclass alone

    def facts(self) -> list[str]:
        """Lines that the report begins with, between the machine and the folder."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """Measure everything, in order."""
        raise NotImplementedError

    def line(self, row: Row) -> str:
        """What is printed as soon as a row is there."""
        raise NotImplementedError

    def tables(self, rows: Sequence[Any]) -> list[str]:
        raise NotImplementedError

    def conclusions(self, rows: Sequence[Any]) -> list[str]:
        """What the report ends with."""
        raise NotImplementedError

    def draw(self, path: Path, rows: Sequence[Any]) -> None:
        raise NotImplementedError

    @property
    def failed(self) -> bool:
        """Whether the exit status is 1."""
        return False

    @property
    def threads(self) -> int:
        """That a measurement keeps busy."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def helper_seconds(self) -> float:
        """CPU seconds so far of child processes that measure, see `OtherProcesses`."""
        return 0.0

    # ----------------------------------------------------------------------------------------------------- measurements

    def attempt(self, measurement: Callable[[], Any]) -> Outcome:
        """The outcome of `measurement`; or that it was not begun, and why."""
        late = self.deadline.refuse()
        return self._try(measurement) if late is None else Outcome(NOT_RUN, late)

    def attempt_in_turns(
        self, preparations: Mapping[Hashable, Callable[[], Work]], length: int
    ) -> dict[Hashable, Outcome]:
        """The outcomes, fields of a row, of measurements that are to be compared; or that they were not begun, and why.

        What they prepare is timed alternately, TURNS times each, so that whatever else the machine does meets all of
        them; one alone is timed at once. One that fails is left out from there on.

        Args:
            preparations: by their series, which is what differs from other measurements in its length only. A longer
                one is expected to take longer in proportion.
        """
        turns = 1 if len(preparations) == 1 else TURNS
        late = self.deadline.refuse(sum(self._expect(series, length, turns) for series in preparations))
        if late is not None:
            return dict.fromkeys(preparations, Outcome(NOT_RUN, late))
        outcomes = self._time_in_turns(preparations)
        free_memory(self.device)  # of what all of them held until now
        for series, outcome in outcomes.items():
            if outcome.status == OK:
                self._earlier[series] = (length, outcome.value["ms_median"] / 1e3)
        return outcomes

    def _time_in_turns(self, preparations: Mapping[Hashable, Callable[[], Work]]) -> dict[Hashable, Outcome]:
        works = {series: self._try(partial(self._begin, prepare)) for series, prepare in preparations.items()}
        turns = 1 if sum(work.status == OK for work in works.values()) == 1 else TURNS
        for _ in range(turns):
            for series, work in works.items():
                if work.status == OK:
                    taken = self._try(partial(work.value.watch.take_turn, turns))
                    works[series] = work if taken.status == OK else taken
        return {series: self._try(work.value.finish) if work.status == OK else work for series, work in works.items()}

    def _begin(self, prepare: Callable[[], Work]) -> _Begun:
        work = prepare()
        return _Begun(work, Stopwatch(work.call, self.device, self.args.case_seconds))

    def _try(self, measurement: Callable[[], Any]) -> Outcome:
        """Its outcome, or that it was not begun because the device is lost, now or before."""
        if self._lost is None:
            try:
                return attempt(measurement, self.device)
            except DeviceLostError as error:
                self._lost = str(error)
        return Outcome(NOT_RUN, self._lost)

    def _expect(self, series: Hashable, length: int, turns: int = 1) -> float:
        if series not in self._earlier:
            return 0.0
        earlier, seconds = self._earlier[series]
        return expected_seconds(seconds * max(1.0, length / earlier), self.args.case_seconds, turns)

    def row(self, outcome: Outcome, **fields: Any) -> Any:
        """The row of an outcome: `fields` and, of what was measured, those that its value has."""
        about = {"reason": outcome.reason, "machine": self.machine, "versions": self.versions}
        measured = outcome.value if outcome.status == OK else {}
        return self.row_class(status=outcome.status, **about | fields | measured)

    # ----------------------------------------------------------------------------------------------------------- report

    def describe(self) -> str:
        first, last = f"machine   {self.machine}; {self.versions}", f"results   {self.args.output_dir}"
        return "\n".join([first, *self.facts(), f"{last}, seed {self.args.seed}"])

    def report(self, rows: Sequence[Row]) -> str:
        parts = [self.describe(), *self.tables(rows), list_reasons(rows), *self.conclusions(rows)]
        return "\n\n".join(part for part in parts if part)

    def describe_load(self, cpus: float | None, rows: Sequence[Row] = ()) -> str:
        """What other processes do to the CPUs, as a mean of some time and in the worst of the rows; "" if unknown."""
        seen = [row.cpus_used_by_others for row in rows if row.cpus_used_by_others is not None]
        sentence = describe_others(cpus, self.threads, max(seen, default=None))
        return sentence and f"load      {sentence}"

    def run(self) -> int:
        """Measure, print, and write rows and plot; what was measured before an interruption is reported, too."""
        results, plot = (self.args.output_dir / name for name in self.args.results)
        print(f"{self.describe()}\n{self.describe_load(look_around())}\n", flush=True)
        others = OtherProcesses(self.helper_seconds)
        self.args.output.claim(self.args.results)
        rows: list[Row] = []
        try:
            for row in self.rows():
                rows.append(row)
                if row.status != NOT_RUN:
                    save_rows(results, rows, to_mapping(self.args))
                    print(f"  {self.line(row)}", flush=True)
        finally:
            if rows:
                save_rows(results, rows, to_mapping(self.args))
                self.draw(plot, rows)
                print(f"\n{self.report(rows)}\n\n{self.describe_load(others.cpus(), rows)}", flush=True)
        return 1 if self.failed else 0


def run(bench: type[Bench], arguments: BenchArguments) -> int:
    """From a benchmark's arguments to its exit status: 1 for a gate that failed or files that cannot be written, 2 for
    arguments that cannot be used, 130 for an interruption."""
    try:
        made = bench(arguments.resolve())
    except (ValueError, TypeError) as error:
        return fail(arguments.command, error, status=2)
    try:
        return made.run()
    except OSError as error:
        return fail(arguments.command, error, status=1)
    except KeyboardInterrupt:
        return fail(arguments.command, "interrupted; what was measured is kept", status=130)
