"""The tables that `tnt bench kernels` prints, and its plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..common.pictures import COLORS, count_tokens, make_y_logarithmic, picture, short_count
from ..common.timing import CANNOT_RUN, FAILED, GATE_FAILED, MISSING, NOT_RUN, OK, OUT_OF_MEMORY
from .rows import KernelRow, Row

# What a cell says when there is no time; the reasons stand below the table.
SHORT = {
    MISSING: "missing", CANNOT_RUN: "cannot", GATE_FAILED: "gate", OUT_OF_MEMORY: "memory", FAILED: "failed",
    NOT_RUN: "not run",
}  # fmt: skip
MIB = 2**20
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


def length_table(rows: Sequence[Row], name: Callable[[Row], str], cell: Callable[[Row], str] = speed) -> str:
    """One line for each name, one column for each length."""
    lengths = sorted({row.length for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cells.setdefault(name(row), {})[row.length] = cell(row)
    head = ["tokens in a row", *map(short_count, lengths)]
    return align([head, *([n, *(line.get(T, "") for T in lengths)] for n, line in cells.items())])


def name_of(row: KernelRow) -> str:
    chunk = "" if row.chunk_size is None else f" C={row.chunk_size}"
    return f"{row.contender}{'' if row.memory is None else ' ' + row.memory}{chunk}"


def detail_table(rows: Sequence[KernelRow]) -> str:
    """Time, spread, rates and memory of each row that was measured."""
    head = ["", "ms (lowest-highest)", "tokens/s", "TFLOP/s", "GB/s", "extra MiB"]
    lines = [
        [
            name_of(row),
            f"{row.ms_median:.3g} ({row.ms_lowest:.3g}-{row.ms_highest:.3g})",
            speed(row),
            _number(row.operations_per_second, lambda x: f"{x / 1e12:.3g}"),
            _number(row.bytes_per_second, lambda x: f"{x / 1e9:.3g}"),
            _number(row.peak_extra_bytes, lambda x: f"{x / MIB:,.0f}"),
        ]
        for row in rows
        if row.status == OK
    ]
    return align([head, *lines]) if lines else "nothing was measured"


def list_reasons(rows: Iterable[Row], name: Callable[[Row], str]) -> str:
    """Why cells have no time, or what is to be said of one: each reason once, with whom it concerns; not the gate's."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.status not in (NOT_RUN, GATE_FAILED) and row.reason:
            # Every lack of memory is told in other numbers.
            same = "" if row.status == OUT_OF_MEMORY else row.reason
            groups.setdefault((row.contender, row.status, same), []).append(row)
    lines = []
    for (contender, status, _), members in groups.items():
        who = contender if status == MISSING else f"{name(members[0])} T={members[0].length}{_and_more(members)}"
        lines.append(f"  {who}: {'timed, but' if status == OK else f'{status}:'} {_shorten(members[0].reason)}")
    not_run = [row for row in rows if row.status == NOT_RUN]
    if not_run:
        reasons = list(dict.fromkeys(row.reason.partition(": would")[0] for row in not_run))
        lines.append(f"  {len(not_run)} measurements not run: {_shorten('; '.join(reasons))}")
    return "\n".join(["remarks", *lines]) if lines else ""


def save_kernel_plot(path: Path, rows: Sequence[KernelRow], headline_chunk: int, headline_length: int) -> None:
    """A PNG of tokens per second: by length at one chunk size, and below by chunk size at one length."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    colors = {n: COLORS[i % len(COLORS)] for i, n in enumerate(dict.fromkeys(_line_name(row) for row in rows))}
    with picture(path, f"Speed of one memory operation, medians: {describe_rows(rows)}", height=7) as figure:
        panels = figure.subplots(2, len(modes), squeeze=False)
        for (by_length, by_chunk), mode in zip(panels.T, modes, strict=True):
            mine = [row for row in rows if row.mode == mode and row.status == OK]
            lines: dict[str, dict[int, float]] = {}
            for row in mine:
                if row.chunk_size in (None, headline_chunk):
                    lines.setdefault(_line_name(row), {})[row.length] = row.tokens_per_second
            draw_speeds(by_length, lines, colors, "tokens in a row")
            by_length.set_title(f"{mode}, chunks of {headline_chunk}")
            lines, chunkless = {}, {}
            for row in mine:
                if row.length == headline_length and row.chunk_size is not None:
                    lines.setdefault(_line_name(row), {})[row.chunk_size] = row.tokens_per_second
                elif row.length == headline_length:
                    chunkless[_line_name(row)] = row.tokens_per_second
            for name, value in chunkless.items():
                by_chunk.axhline(value, color=colors[name], linestyle="--", label=f"{name} (has no chunks)")
            draw_speeds(by_chunk, lines, colors, "tokens in a chunk")
            by_chunk.set_title(f"{mode}, rows of {short_count(headline_length)} tokens")


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


def _line_name(row: KernelRow) -> str:
    return row.contender if row.memory is None else f"{row.contender} {row.memory}"


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _and_more(members: list[Row]) -> str:
    return f" and {len(members) - 1} more" if len(members) > 1 else ""


def _shorten(reason: str) -> str:
    return reason if len(reason) <= REASON_LENGTH else reason[: REASON_LENGTH - 1] + "…"
