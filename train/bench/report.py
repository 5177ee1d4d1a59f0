"""The tables that the benchmarks print, and what their plots share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..common.pictures import count_tokens, make_y_logarithmic, short_count
from ..common.timing import CANNOT_RUN, FAILED, GATE_FAILED, MISSING, NOT_RUN, OK, OUT_OF_MEMORY
from .rows import Row

# What a cell says when there is no time; the reasons stand below the table.
SHORT = {
    MISSING: "missing", CANNOT_RUN: "cannot", GATE_FAILED: "gate", OUT_OF_MEMORY: "memory", FAILED: "failed",
    NOT_RUN: "not run",
}  # fmt: skip
GIB, MIB = 2**30, 2**20
REASON_LENGTH = 160


def align(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one to the left and the others to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    )


def speed(row: Row) -> str:
    """Tokens per second in three digits, 12.3M; or a word for what went wrong."""
    if row.status != OK:
        return SHORT[row.status]
    value, unit = next((x, u) for x, u in ((1e6, "M"), (1e3, "k"), (1, "")) if row.tokens_per_second >= x or x == 1)
    return f"{row.tokens_per_second / value:.3g}{unit}"


def length_table(rows: Sequence[Row], cell: Callable[[Any], str] = speed) -> str:
    """One line for each name, one column for each length."""
    lengths = sorted({row.length for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cells.setdefault(row.name, {})[row.length] = cell(row)
    head = ["tokens in a row", *map(short_count, lengths)]
    return align([head, *([n, *(line.get(T, "") for T in lengths)] for n, line in cells.items())])


def spread(row: Row, digits: int = 3) -> str:
    """Milliseconds, "median (lowest-highest)"; or a word for what went wrong."""
    if row.status != OK:
        return speed(row)
    median, lowest, highest = (f"{ms:.{digits}g}" for ms in (row.ms_median, row.ms_lowest, row.ms_highest))
    return f"{median} ({lowest}-{highest})"


def list_reasons(rows: Iterable[Row]) -> str:
    """Why cells have no time, or what is to be said of one: each reason once, with whom it concerns; not the gate's."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.status not in (NOT_RUN, GATE_FAILED) and row.reason:
            # Every lack of memory is told in other numbers.
            same = "" if row.status == OUT_OF_MEMORY else row.reason
            groups.setdefault((row.contender, row.status, same), []).append(row)
    lines = []
    for (contender, status, _), members in groups.items():
        who = contender if status == MISSING else f"{members[0].name} T={members[0].length}{_and_more(members)}"
        lines.append(f"  {who}: {'timed, but' if status == OK else f'{status}:'} {_shorten(members[0].reason)}")
    not_run = [row for row in rows if row.status == NOT_RUN]
    if not_run:
        reasons = list(dict.fromkeys(row.reason.partition(": would")[0] for row in not_run))
        lines.append(f"  {len(not_run)} measurements not run: {_shorten('; '.join(reasons))}")
    return "\n".join(["remarks", *lines]) if lines else ""


def describe_rows(rows: Sequence[Row]) -> str:
    """Where the rows of one benchmark were measured, and on how much."""
    return f"{rows[0].batch * rows[0].length:,} tokens a call, {rows[0].dtype}, {rows[0].machine}"


def draw_speeds(axes: Axes, lines: dict[str, dict[int, float]], colors: dict[str, str], xlabel: str) -> None:
    """Tokens per second over lengths or chunk sizes, both logarithmic, with a tick at every x that was measured."""
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), color=colors[name], marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel="tokens/s")
    count_tokens(axes, sorted({x for points in lines.values() for x in points}))
    make_y_logarithmic(axes, EngFormatter(sep=""))


def _and_more(members: list[Row]) -> str:
    return f" and {len(members) - 1} more" if len(members) > 1 else ""


def _shorten(reason: str) -> str:
    return reason if len(reason) <= REASON_LENGTH else reason[: REASON_LENGTH - 1] + "…"
