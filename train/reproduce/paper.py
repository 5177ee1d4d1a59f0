"""What the paper reports, and which of its orderings are compared with what is measured here.

Source: TNT, arXiv 2511.07343: perplexity on C4 of models of 150M parameters, trained on 10 billion tokens of T5's
tokenizer at a context of 16,384. The ablations are those of its table 3, the baselines and the chunks those of table 2.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv 2511.07343, tables 2 and 3: perplexity on C4, 150M parameters, 10 billion tokens"


class Row(NamedTuple):
    """A row of the table.

    title            in words.
    group            rows of one group stand together.
    c4_perplexity    the paper's; None where it has no such row.
    begins_with      the row whose first stage this one goes on from, so that it is trained once.
    read_from        the row whose run has this row's score, measured before its second stage; None: a run of its own.
    """

    title: str
    group: str
    c4_perplexity: float | None
    begins_with: str | None = None
    read_from: str | None = None


BASE = "tnt-1"
HYBRIDS = "hybrids"  # the group of rows that the paper does not have

ROWS = {
    "llama": Row("Transformer (Llama)", "baselines", 20.98),
    "titans-large": Row("Titans, large chunks", "baselines", 23.53),
    "titans-small": Row("Titans, small chunks", "baselines", 22.25),
    "ttt-linear": Row("TTT-Linear", "baselines", 24.18),
    "ttt-mlp": Row("TTT-MLP", "baselines", 24.18),
    "tnt-0": Row("TNT, global memory alone", "memories", 23.53),
    "tnt-1": Row("TNT, 1 local memory", "memories", 21.04),
    "tnt-2": Row("TNT, 2 local memories", "memories", 20.74),
    "tnt-3": Row("TNT, 3 local memories", "memories", 20.47),
    "tnt-4": Row("TNT, 4 local memories", "memories", 20.15),
    "no-global": Row("TNT, 1 local, no global memory", "ablations", 25.60),
    "no-projection": Row("TNT, 1 local, no projection", "ablations", 22.01),
    "projection": Row("TNT, 1 local, with projection", "ablations", 21.04),
    "swapped": Row("TNT, 1 local, chunks swapped only", "stage 2", None, read_from="stage2"),
    "more-steps": Row("TNT, 1 local, more steps only", "stage 2", None, begins_with=BASE),
    "stage2": Row("TNT, 1 local, stage 2", "stage 2", 20.86, begins_with=BASE),
    "hybrid": Row("TNT, 1 local, some blocks attend", HYBRIDS, None),
    "titans-mac": Row("Titans, memory as a context", HYBRIDS, None),
    "titans-mag": Row("Titans, memory as a gate", HYBRIDS, None),
    "titans-mal": Row("Titans, memory as a layer", HYBRIDS, None),
}  # fmt: skip

# The paper's numbers are not always of the same thing as the row here.
REMARKS = [
    "The paper's base (23.53) has the same perplexity as its Titans with chunks of 256; here the global memory alone "
    "and Titans with large chunks are two rows, each beside that number.",
    "The paper has one row for TTT, with chunks of 256, and does not say which memory; here both memories have the "
    "small chunks that the table shows.",
    "The paper also has a gated Transformer (19.82), which is not trained here.",
    "Where there is a row with the Q-K projection, all other TNT rows read at raw queries, while the paper's numbers "
    "beside them are of models with it (its model of one local memory has 22.01 without). Where there is a row without "
    "it, all others have it, as in the paper.",
    "Small chunks of Titans are those of TNT's local memory.",
    "Chunks swapped only: the model of one local memory, read at the chunks of stage 2 without training at them. More "
    "steps only: it is trained for as many steps as stage 2 takes, in the same way, with its chunks kept.",
    "The paper has no models with attention beside memories: hybrids are ours, and trained with --hybrids only.",
]


class Claim(NamedTuple):
    """`better` has a lower loss than `worse`. `paper`: its two numbers; None where it is our own control."""

    better: str
    worse: str
    paper: tuple[float, float] | None


def _claim(better: str, worse: str) -> Claim:
    return Claim(better, worse, (ROWS[better].c4_perplexity, ROWS[worse].c4_perplexity))


CLAIMS = [
    _claim("tnt-1", "tnt-0"), _claim("tnt-2", "tnt-1"), _claim("tnt-3", "tnt-2"), _claim("tnt-4", "tnt-3"),
    _claim("tnt-1", "no-global"), _claim("tnt-1", "no-projection"),
    # Where the other rows read at raw queries, that one of them is the paper's row without the projection.
    Claim("projection", "tnt-1", (ROWS["projection"].c4_perplexity, ROWS["no-projection"].c4_perplexity)),
    _claim("stage2", "tnt-1"), Claim("stage2", "more-steps", None),
    _claim("tnt-1", "titans-small"), _claim("tnt-1", "titans-large"), _claim("titans-small", "titans-large"),
    _claim("tnt-1", "ttt-linear"), _claim("tnt-1", "ttt-mlp"),
    _claim("llama", "tnt-1"), _claim("stage2", "llama"), _claim("tnt-4", "llama"),
]  # fmt: skip
