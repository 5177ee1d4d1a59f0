"""Task `chunks`: the loss of one TNT model read at other local chunk sizes, as in figure 2 of TNT (arXiv 2511.07343).

A model trained at one chunk size is best near it; stage 2 is to move that to the small chunks that decoding uses. No
weight depends on a chunk size, so the same weights are read at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.configuration.validation import divisors

from ..common.pictures import BARS, REFERENCE, assign_colors, count_tokens, draw_curves, move_apart, picture
from .estimates import Estimate
from .perplexity import compare_scores, differences
from .scores import Scores, join_scores
from .task import Setup, Task, report_models

if TYPE_CHECKING:
    from .run import Evaluation


@dataclass(frozen=True)
class ChunkCurve:
    """The scores of the same rows at several chunk sizes.

    own     the chunk size of the smallest local memory in the model's configuration.
    chunks  chunk size of the smallest local memory → those of all of them.
    scores  chunk size of the smallest local memory → scores.
    """

    own: int
    chunks: dict[int, list[int]]
    scores: dict[int, Scores]


def scale_chunks(config: TNTConfig, smallest: int) -> list[int]:
    """Chunk sizes of all local memories when the smallest of them has chunks of `smallest` tokens.

    All are scaled by the same factor: memory i gets `C_i · smallest / min(C)`, rounded (by ratio) to a chunk size that
    it may have: at least 1 and, if it is reset, a divisor of its shard length, and of the segment of Titans' MAC. So
    {4, 16} at 1 is {1, 4}.

    Raises:
        ValueError: if the smallest memory itself cannot have such chunks.
    """
    own = min(config.local_chunk_sizes)
    scaled = [
        _nearest_chunk(chunk * smallest / own, period)
        for chunk, period in zip(config.local_chunk_sizes, _periods(config), strict=True)
    ]
    first = config.local_chunk_sizes.index(own)
    if scaled[first] != smallest:
        period = _periods(config)[first]
        near = {max(d for d in divisors(period) if d <= smallest)} | {d for d in divisors(period) if d > smallest}
        raise ValueError(
            f"{smallest} must divide {period}, the shard length (or segment) of the local memory with the smallest "
            f"chunks; use {' or '.join(map(str, sorted(near)[:2]))}"
        )
    return scaled


def _periods(config: TNTConfig) -> list[int | None]:
    """What the chunks of each local memory must divide: its shard length and, as a context, the segment."""
    segments = [config.global_chunk_size] if config.memory_as == "context" else []
    return [math.gcd(*segments, *([shard] if shard else [])) or None for shard in config.shard_lengths]


def _nearest_chunk(target: float, period: int | None) -> int:
    """The chunk size nearest to `target` by ratio that divides the period, if there is one."""
    if period is None:
        return max(1, round(target))
    return min(divisors(period), key=lambda d: abs(math.log(d / target)))


def default_chunk_sizes(config: TNTConfig, seq_len: int) -> list[int]:
    """1, 2, 4, … up to the shard length (or segment) of the memory with the smallest chunks, or to seq_len if that is
    less, as far as they divide it; and the model's own chunk size."""
    own = min(config.local_chunk_sizes)
    period = _periods(config)[config.local_chunk_sizes.index(own)]
    limit = min(period or seq_len, seq_len)
    powers = (2**i for i in range(limit.bit_length()))
    return sorted({own, *(p for p in powers if p <= limit and (period is None or period % p == 0))})


@contextmanager
def local_chunks(model: TNTForCausalLM, chunk_sizes: list[int]) -> Iterator[None]:
    """The model with these local chunk sizes; its own are restored afterwards, also after an error."""
    own = list(model.config.local_chunk_sizes)
    model.set_local_chunks(chunk_sizes)
    try:
        yield
    finally:
        model.set_local_chunks(own)


def measure_chunks(model: TNTForCausalLM, sizes: list[int], score: Callable[[TNTForCausalLM], Scores]) -> ChunkCurve:
    """Score the model at each size of its smallest local memory; its own is always among them."""
    config, own = model.config, min(model.config.local_chunk_sizes)
    chunks = {size: scale_chunks(config, size) for size in sorted({*sizes, own})}
    chunks[own] = list(config.local_chunk_sizes)
    scores = {}
    for size, all_sizes in chunks.items():
        with local_chunks(model, all_sizes):
            scores[size] = score(model)
    return ChunkCurve(own, chunks, scores)


class ChunksTask(Task):
    """Results are `ChunkCurve`s."""

    def prepare(self, setup: Setup) -> str | None:
        for subject in setup.subjects:
            if not subject.is_tnt:
                return f"{subject.source} is a {subject.config.model_type} model, and only TNT models have chunks"
            if not subject.has_local_memories:
                return f"{subject.source} has no local memory whose chunks could be changed"
        for subject in setup.subjects:
            for size in setup.arguments.chunk_sizes:
                try:
                    if size >= 1:  # another is a problem that the arguments report themselves
                        scale_chunks(subject.config, size)
                except ValueError as error:
                    setup.problems.append(f"--chunk-sizes with {subject.source}: {error}")
        return None

    def measure(self, evaluation: Evaluation, label: str) -> ChunkCurve:
        model, arguments = evaluation.models[label], evaluation.arguments
        own = list(model.config.local_chunk_sizes)

        def score(model: TNTForCausalLM) -> Scores:
            chunks = model.config.local_chunk_sizes
            if chunks == own:
                return evaluation.read_rows(label)[0]
            return join_scores([x.sum_rows() for x in evaluation.iterate(label, f"{label}, chunks {chunks}")])

        sizes = arguments.chunk_sizes or default_chunk_sizes(model.config, arguments.seq_len)
        return measure_chunks(model, sizes, score)

    def report(self, results: dict[str, ChunkCurve]) -> dict[str, Any]:
        base = next(iter(results.values()))

        def to_json(curve: ChunkCurve) -> dict[str, Any]:
            own, base_own = curve.scores[curve.own], base.scores[base.own]
            points = [
                {
                    "chunk_size": size, "local_chunk_sizes": curve.chunks[size], **scores.to_json(),
                    "minus_own_chunk_size": differences(own, scores),
                    "minus_first_model_as_configured": differences(base_own, scores),
                }
                for size, scores in curve.scores.items()
            ]  # fmt: skip
            return {"own_chunk_size": curve.own, "curve": points}

        def compare(first: ChunkCurve, second: ChunkCurve) -> list[dict[str, Any]]:
            shared = [size for size in second.scores if size in first.scores]
            return [{"chunk_size": n, **differences(first.scores[n], second.scores[n])} for n in shared]

        return report_models(results, to_json, compare)

    def describe(self, results: dict[str, ChunkCurve]) -> list[str]:
        lines = []
        for name, curve in results.items():
            lines.append(f"{name}: perplexity by chunk size; difference to its own chunks in nats per token (paired)")
            for size, scores in curve.scores.items():
                remark = "own" if size == curve.own else str(_difference(curve.scores[curve.own], scores))
                lines.append(f"  {_write(curve.chunks[size]):>12}  {scores.perplexity}   {remark}")
        return lines

    def draw(self, path: Path, results: dict[str, ChunkCurve]) -> None:
        """Perplexity by chunk size, and below it what it costs to read a model at chunks other than its own; for
        several models also how much each loses to the first at the same chunks.

        The errors above are mostly how rows differ from one another, which is the same at each chunk size and for each
        model; those of the differences are paired, without it.
        """
        (first, base), *others = results.items()
        with picture(path, f"Local chunks at inference; {BARS}, of differences paired by row", height=6.5) as figure:
            colors = assign_colors(results)
            places = [["perplexity"] * 2, ["own", "first"] if others else ["own"] * 2]
            panels = figure.subplot_mosaic(places)
            several = any(len(chunks) > 1 for curve in results.values() for chunks in curve.chunks.values())
            for panel, axes in panels.items():
                curves = {name: _curve_of(panel, curve, base) for name, curve in results.items()}
                draw_curves(axes, curves)
                for i, (name, curve) in enumerate(results.items()):
                    if curve.own in curves[name]:
                        axes.plot(
                            move_apart([curve.own], i, len(curves)), curves[name][curve.own].value, "o",
                            color=colors[name], markersize=10, markerfacecolor="none", markeredgewidth=1.5,
                            label=f"{name} as configured, {_write(curve.chunks[curve.own])}",
                        )  # fmt: skip
                count_tokens(axes, sorted({size for curve in results.values() for size in curve.scores}))
                axes.set_xlabel("tokens in a local chunk" + (" (of the smallest; all scaled alike)" if several else ""))
                if panel == "perplexity":
                    axes.set_ylabel("perplexity")
                else:
                    of = "that at a model's own chunks" if panel == "own" else f"that of {first} at the same chunks"
                    axes.set_title(f"Loss minus {of}")
                    axes.axhline(0, label="no difference", **REFERENCE)
                    axes.set_ylabel("nats per token")


def _curve_of(panel: str, curve: ChunkCurve, base: ChunkCurve) -> dict[int, Estimate]:
    """A model's points in a panel, by chunk size; empty for the first model in the panel of differences to it."""
    if panel == "perplexity":
        return {size: s.perplexity for size, s in curve.scores.items()}
    if panel == "own":
        return {size: _difference(curve.scores[curve.own], s) for size, s in curve.scores.items()}
    shared = {} if curve is base else {size: s for size, s in curve.scores.items() if size in base.scores}
    return {size: _difference(base.scores[size], s) for size, s in shared.items()}


def _difference(first: Scores, second: Scores) -> Estimate:
    return compare_scores(first, second)["nats_per_token"]


def _write(chunks: list[int]) -> str:
    return "/".join(map(str, chunks))
