"""The targets that the Triton kernels are held to, each with the two numbers that decide it.

They are stated for an H200, bf16, heads of 64, expansion 2, chunks of 16 and shards of 2048 tokens. Where a target
names no length, the length that it does worst at decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..common.costs import BOTH
from ..common.timing import OK
from .rows import KernelRow

CONDITIONS = {"dtype": "bf16", "head_dim": 64, "expansion": 2, "shard_length": 2048}
CARD = "H200"
CHUNK, LONG, ATTENTION_FROM = 16, 32768, 8192


class Point(NamedTuple):
    """Who is measured: contender, memory type, chunk size."""

    contender: str
    memory: str | None
    chunk_size: int | None


class Target(NamedTuple):
    """`ours` must reach `factor` times the tokens per second of `other` at every length that `at` admits."""

    text: str
    ours: Point
    other: Point
    factor: float
    at: Callable[[int], bool]


class Verdict(NamedTuple):
    """`result` is "met", "missed" or "not measured"."""

    result: str
    text: str


OURS = Point("triton", "mlp", CHUNK)
ATTENTION = Point("flash", None, None)
TARGETS = (
    Target("10 times the torch backend", OURS, Point("torch", "mlp", CHUNK), 10, lambda T: True),
    Target(
        "linear memory 1.5 times FLA's", Point("triton", "linear", CHUNK), Point("fla", "linear", CHUNK), 1.5,
        lambda T: True,
    ),
    Target(f"3 times FlashAttention at T={LONG}", OURS, ATTENTION, 3, lambda T: T == LONG),
    Target(f"no slower than FlashAttention from T={ATTENTION_FROM}", OURS, ATTENTION, 1, lambda T: T >= ATTENTION_FROM),
    Target("C=8 within 1.5 times the time of C=16", Point("triton", "mlp", 8), OURS, 1 / 1.5, lambda T: True),
)  # fmt: skip


def judge(target: Target, rows: Sequence[KernelRow]) -> Verdict:
    """Hold a run's forward + backward rows against a target."""
    ours, other = (_speeds(point, rows) for point in (target.ours, target.other))
    shared = [T for T in ours if T in other and target.at(T)]
    if not shared:
        absent = [_describe(point) for point, speeds in ((target.ours, ours), (target.other, other))
                  if not any(target.at(T) for T in speeds)]  # fmt: skip
        why = f"no time of {' and none of '.join(absent)}" if absent else "no length at which both were timed"
        return Verdict("not measured", f"{target.text}: {why}")
    T = min(shared, key=lambda T: ours[T] / other[T])
    ratio = ours[T] / other[T]
    return Verdict(
        "met" if ratio >= target.factor else "missed",
        f"{target.text}: {ours[T]:,.0f} against {other[T]:,.0f} tokens/s at T={T}, "
        f"{ratio:.2f} times (at least {target.factor:.2f})",
    )


def differing_conditions(rows: Sequence[KernelRow], machine: str) -> list[str]:
    """In what this run differs from what the targets are stated for, as "dtype fp32 instead of bf16"."""
    differences = [] if CARD in machine else [f"{machine} instead of an {CARD}"]
    for name, wanted in CONDITIONS.items():
        got = {getattr(row, name) for row in rows if row.memory == "mlp" and row.contender in ("torch", "triton")}
        differences += [f"{name} {value} instead of {wanted}" for value in sorted(got - {wanted}, key=str)]
    return differences


def summarize_targets(rows: Sequence[KernelRow], machine: str) -> str:
    """The block that ends the report."""
    verdicts = [judge(target, rows) for target in TARGETS]
    lines = ["targets, forward + backward, the worst length decides"]
    differences = differing_conditions(rows, machine)
    if differences:
        lines.append(f"  stated for other conditions: here {', '.join(differences)}")
    return "\n".join([*lines, *(f"  {verdict.result:<12}  {verdict.text}" for verdict in verdicts)])


def _speeds(point: Point, rows: Sequence[KernelRow]) -> dict[int, float]:
    """Tokens per second by length."""
    return {
        row.length: row.tokens_per_second
        for row in rows
        if (row.contender, row.memory, row.chunk_size) == point and row.mode == BOTH and row.status == OK
    }


def _describe(point: Point) -> str:
    words = [point.contender, point.memory, None if point.chunk_size is None else f"C={point.chunk_size}"]
    return " ".join(word for word in words if word)
