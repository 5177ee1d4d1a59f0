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
from typing import Any

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.configuration.validation import divisors

from ..common.pictures import BARS, COLORS, REFERENCE, count_tokens, draw_curve, move_apart, picture
from .estimates import Estimate
from .perplexity import compare_scores
from .scores import Scores


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
    it may have: at least 1 and, if it is reset, a divisor of its shard length. So {4, 16} at 1 is {1, 4}.

    Raises:
        ValueError: if the smallest memory itself cannot have such chunks.
    """
    own = min(config.local_chunk_sizes)
    scaled = [
        _nearest_chunk(chunk * smallest / own, shard)
        for chunk, shard in zip(config.local_chunk_sizes, config.shard_lengths, strict=True)
    ]
    first = config.local_chunk_sizes.index(own)
    if scaled[first] != smallest:
        shard = config.shard_lengths[first]
        near = {max(d for d in divisors(shard) if d <= smallest)} | {d for d in divisors(shard) if d > smallest}
        raise ValueError(
            f"{smallest} must divide {shard}, the shard length of the local memory with the smallest chunks; "
            f"use {' or '.join(map(str, sorted(near)[:2]))}"
        )
    return scaled


def _nearest_chunk(target: float, shard: int | None) -> int:
    """The chunk size nearest to `target` by ratio that a memory with this shard length may have."""
    if shard is None:
        return max(1, round(target))
    return min(divisors(shard), key=lambda d: abs(math.log(d / target)))


def default_chunk_sizes(config: TNTConfig, seq_len: int) -> list[int]:
    """1, 2, 4, … up to the shard length of the memory with the smallest chunks, or to seq_len if that is less, as far
    as they divide it; and the model's own chunk size."""
    own = min(config.local_chunk_sizes)
    shard = config.shard_lengths[config.local_chunk_sizes.index(own)]
    limit = min(shard or seq_len, seq_len)
    powers = (2**i for i in range(limit.bit_length()))
    return sorted({own, *(p for p in powers if p <= limit and (shard is None or shard % p == 0))})


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


def report_chunks(curves: dict[str, ChunkCurve]) -> dict[str, Any]:
    """What chunks.json holds."""
    (_, base), *others = curves.items()

    def differences(first: Scores, second: Scores) -> dict[str, Any]:
        return {name: estimate.to_json() for name, estimate in compare_scores(first, second).items()}

    return {
        "models": {
            name: {
                "own_chunk_size": curve.own,
                "curve": [
                    {
                        "chunk_size": size, "local_chunk_sizes": curve.chunks[size], **curve.scores[size].to_json(),
                        "minus_own_chunk_size": differences(curve.scores[curve.own], curve.scores[size]),
                        "minus_first_model_as_configured": differences(base.scores[base.own], curve.scores[size]),
                    }
                    for size in curve.chunks
                ],
            }
            for name, curve in curves.items()
        },
        "minus_first_model": {
            name: [
                {"chunk_size": size, **differences(base.scores[size], curve.scores[size])}
                for size in curve.scores
                if size in base.scores
            ]
            for name, curve in others
        },
    }  # fmt: skip


def describe_chunks(curves: dict[str, ChunkCurve]) -> list[str]:
    """Lines for the terminal."""
    lines = []
    for name, curve in curves.items():
        lines.append(f"{name}: perplexity by chunk size; difference to its own chunks in nats per token (paired)")
        for size, scores in curve.scores.items():
            difference = compare_scores(curve.scores[curve.own], scores)["nats_per_token"]
            remark = "own" if size == curve.own else str(difference)
            lines.append(f"  {'/'.join(map(str, curve.chunks[size])):>12}  {scores.perplexity}   {remark}")
    return lines


def draw_chunks(path: Path, curves: dict[str, ChunkCurve]) -> None:
    """Perplexity by chunk size, and below it what it costs to read a model at chunks other than its own; for several
    models also how much each loses to the first at the same chunks.

    The errors above are mostly how rows differ from one another, which is the same at each chunk size and for each
    model; those of the differences are paired, without it.
    """
    (first, base), *others = curves.items()
    with picture(path, f"Local chunks at inference; {BARS}, of differences paired by row", height=6.5) as figure:
        places = [["perplexity"] * 2, ["own", "first"] if others else ["own"] * 2]
        panels = figure.subplot_mosaic(places)
        for i, (color, (name, curve)) in enumerate(zip(COLORS, curves.items(), strict=False)):
            own, at = curve.scores[curve.own], "/".join(map(str, curve.chunks[curve.own]))
            shared = {size: s for size, s in curve.scores.items() if size in base.scores}
            lines = {
                "perplexity": {size: s.perplexity for size, s in curve.scores.items()},
                "own": {size: _difference(own, s) for size, s in curve.scores.items()},
                "first": {size: _difference(base.scores[size], s) for size, s in shared.items()},
            }
            for panel in panels.keys() - ({"first"} if curve is base else set()):
                x = move_apart(lines[panel], i, len(curves))
                draw_curve(panels[panel], x, list(lines[panel].values()), color=color, label=name)
                if curve.own in lines[panel]:
                    place = move_apart([curve.own], i, len(curves)), lines[panel][curve.own].value
                    panels[panel].plot(
                        *place, "o", color=color, markersize=10, markerfacecolor="none", markeredgewidth=1.5,
                        label=f"{name} as configured, {at}",
                    )  # fmt: skip
        ticks = sorted({size for curve in curves.values() for size in curve.scores})
        several = any(len(chunks) > 1 for curve in curves.values() for chunks in curve.chunks.values())
        for axes in panels.values():
            count_tokens(axes, ticks)
            axes.set_xlabel("tokens in a local chunk" + (" (of the smallest; all scaled alike)" if several else ""))
        panels["perplexity"].set_ylabel("perplexity")
        panels["own"].set_title("Loss minus that at a model's own chunks")
        if others:
            panels["first"].set_title(f"Loss minus that of {first} at the same chunks")
        for panel in panels.keys() - {"perplexity"}:
            panels[panel].axhline(0, label="no difference", **REFERENCE)
            panels[panel].set_ylabel("nats per token")


def _difference(first: Scores, second: Scores) -> Estimate:
    return compare_scores(first, second)["nats_per_token"]
