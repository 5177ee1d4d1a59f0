"""One run of a benchmark: what is still begun, rows that are kept as they come, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..common.machine import OtherProcesses, describe_machine, describe_others, describe_versions, look_around
from ..common.timing import NOT_RUN, OK, Deadline, DeviceLostError, Outcome, attempt
from ..options import fail, to_mapping
from .arguments import BenchArguments
from .measure import expected_seconds
from .report import list_reasons
from .rows import Row, save_rows


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

    # ----------------------------------------------------------------------------------------------------- measurements

    def attempt(self, measurement: Callable[[], dict[str, Any]], series: Hashable = None, length: int = 1) -> Outcome:
        """The outcome of `measurement`, which returns fields of a row; or that it was not begun, and why.

        Args:
            series: what differs from other measurements in its length only. A longer one is expected to take longer in
                proportion. None: nothing is expected.
        """
        if self._lost is not None:
            return Outcome(NOT_RUN, self._lost)
        late = self.deadline.refuse(self._expect(series, length))
        if late is not None:
            return Outcome(NOT_RUN, late)
        try:
            outcome = attempt(measurement, self.device)
        except DeviceLostError as error:
            self._lost = str(error)
            return Outcome(NOT_RUN, self._lost)
        if series is not None and outcome.status == OK:
            self._earlier[series] = (length, outcome.value["ms_median"] / 1e3)
        return outcome

    def _expect(self, series: Hashable, length: int) -> float:
        if series not in self._earlier:
            return 0.0
        earlier, seconds = self._earlier[series]
        return expected_seconds(seconds * max(1.0, length / earlier), self.args.case_seconds)

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
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        seen = [row.cpus_used_by_others for row in rows if row.cpus_used_by_others is not None]
        sentence = describe_others(cpus, threads, max(seen, default=None))
        return sentence and f"load      {sentence}"

    def run(self) -> int:
        """Measure, print, and write rows and plot; what was measured before an interruption is reported, too."""
        results, plot = (self.args.output_dir / name for name in self.args.results)
        print(f"{self.describe()}\n{self.describe_load(look_around())}\n", flush=True)
        others = OtherProcesses()
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
        resolved = arguments.resolve()
    except (ValueError, TypeError) as error:
        return fail(arguments.command, error, status=2)
    try:
        return bench(resolved).run()
    except OSError as error:
        return fail(arguments.command, error, status=1)
    except KeyboardInterrupt:
        return fail(arguments.command, "interrupted; what was measured is kept", status=130)
