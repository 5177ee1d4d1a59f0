"""Task `retrieval`: associative recall of a value from a text of key-value pairs, by length and depth."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modeling_tnt import TNTForCausalLM

from ..common.pictures import BARS, REFERENCE, count_tokens, draw_curves, picture, short_count
from ..common.progress import progress_bar
from .arguments import RETRIEVAL_LENGTHS
from .estimates import Estimate, Proportion, mean
from .needles import DEPTH_BINS, Needle, NeedleFactory, digits_for
from .scores import evaluation_mode
from .task import Setup, Task

if TYPE_CHECKING:
    from .run import Evaluation

PIECE = 1024  # tokens that a TNT model reads at a time
ANSWER_ROOM = 16  # tokens kept free behind a document for its answer


@dataclass(frozen=True)
class Retrieval:
    """A model's answers to the documents of one length.

    exact   [n] bool, whether greedy decoding gives the value, token by token.
    nats    [n] float64, −ln p(value | document).
    depths  [n] float64, where the needle begins, as a share of the document.
    """

    length: int
    pairs: int
    exact: Tensor
    nats: Tensor
    depths: Tensor

    @property
    def accuracy(self) -> Proportion:
        return Proportion(int(self.exact.sum()), len(self.exact))

    @property
    def chance(self) -> float:
        """Accuracy of a model that answers with any value of the document: 1 / pairs."""
        return 1 / self.pairs

    @property
    def chance_nats(self) -> float:
        """Nats of that answer: ln pairs. A model that knows only that digits follow needs ln 10 for each digit."""
        return math.log(self.pairs)

    @property
    def answer_nats(self) -> Estimate:
        return mean(self.nats)

    def by_depth(self) -> list[Proportion | None]:
        """The accuracy in `DEPTH_BINS` equal ranges of depth; None where there is no document."""
        index = (self.depths.clamp(0, 1) * DEPTH_BINS).long().clamp(max=DEPTH_BINS - 1)
        chosen = (self.exact[index == i] for i in range(DEPTH_BINS))
        return [Proportion(int(exact.sum()), len(exact)) if len(exact) else None for exact in chosen]

    def to_json(self) -> dict[str, Any]:
        return {
            "length": self.length, "pairs": self.pairs, "exact_match": self.accuracy.to_json(), "chance": self.chance,
            "nats_of_answer": self.answer_nats.to_json(), "chance_nats": self.chance_nats,
            "by_depth": [
                {"from": i / DEPTH_BINS, "to": (i + 1) / DEPTH_BINS, "exact_match": p.to_json()}
                for i, p in enumerate(self.by_depth())
                if p is not None
            ],
        }  # fmt: skip


@torch.no_grad()
def measure_retrieval(
    model: nn.Module,
    needles: list[Needle],
    *,
    batch_size: int,
    pad_token_id: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Retrieval:
    """Ask a model for the values of documents of equal length.

    The answer is given with the question (teacher forcing), and counts if each of its tokens is the most probable one.
    That is the case if and only if greedy decoding writes the answer: both take the same choices until one is wrong.

    A TNT model reads a document in pieces of `PIECE` tokens with its cache, so that the memory needed does not grow
    with the length; other models read it at once.
    """
    device = next(model.parameters()).device
    exact, nats = [], []
    with evaluation_mode(model):
        for start in range(0, len(needles), batch_size):
            batch = needles[start : start + batch_size]
            context = torch.stack([needle.context for needle in batch])
            answers = pad_sequence([n.answer for n in batch], batch_first=True, padding_value=-100)
            given = answers[:, :-1].masked_fill(answers[:, :-1] == -100, pad_token_id)  # after the answer: not seen
            logits = read_to_the_end(model, torch.cat([context, given], dim=1).to(device), answers.shape[1])
            log_p = logits.float().log_softmax(-1).cpu()
            asked = answers != -100
            right = (log_p.argmax(-1) == answers) | ~asked
            of_answer = log_p.gather(-1, answers.clamp(min=0)[..., None])[..., 0].masked_fill(~asked, 0)
            exact.append(right.all(1))
            nats.append(-of_answer.double().sum(1))
            if on_batch is not None:
                on_batch(len(batch))
    depths = torch.tensor([needle.depth for needle in needles], dtype=torch.float64)
    return Retrieval(len(needles[0].context), needles[0].pairs, torch.cat(exact), torch.cat(nats), depths)


def read_to_the_end(model: nn.Module, input_ids: Tensor, keep: int) -> Tensor:
    """Logits of the last `keep` columns of input_ids [B, T]: [B, keep, vocab]."""
    if isinstance(model, TNTForCausalLM):
        cache = None
        for piece in input_ids[:, :-keep].split(PIECE, dim=1):
            read = model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1)
            cache = read.cache
        return model(input_ids=input_ids[:, -keep:], cache=cache, use_cache=True).logits
    spared = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=input_ids, use_cache=False, **spared).logits[:, -keep:]


class RetrievalTask(Task):
    """Results are lists of `Retrieval`, one for each length."""

    def __init__(self) -> None:
        self.needles: dict[int, list[Needle]] = {}

    def prepare(self, setup: Setup) -> str | None:
        lengths = _choose_lengths(setup)
        if not lengths:
            return "no document is short enough; give --retrieval-lengths"
        self.longest = max(lengths)
        if setup.arguments.context_parallel > 1:
            setup.remarks.append("retrieval: each process reads every document by itself")
        if setup.tokenizer is not None:
            factory = NeedleFactory(setup.tokenizer, max(0, setup.arguments.seed))
            for length in lengths:
                try:
                    self.needles[length] = factory.make(length, setup.arguments.retrieval_documents)
                except ValueError as error:
                    setup.problems.append(f"--retrieval-lengths: {error}")
        return None

    def measure(self, evaluation: Evaluation, label: str) -> list[Retrieval]:
        model, batch_size, results = evaluation.models[label], evaluation.arguments.batch_size, []
        shown = {"leave": False, "active": evaluation.processes.is_main}
        for length, needles in self.needles.items():
            with progress_bar(len(needles), f"{label}, {length} tokens", "document", **shown) as bar:
                results.append(measure_retrieval(model, needles, batch_size=batch_size, on_batch=bar.update))
        return results

    def report(self, results: dict[str, list[Retrieval]]) -> dict[str, Any]:
        return {
            "format": "KEY = VALUE lines of random letters and digits; KEY = is asked at the end",
            "standard_errors": "exact_match: Wilson's interval of one standard error; nats_of_answer: of the mean",
            "models": {name: [result.to_json() for result in lengths] for name, lengths in results.items()},
        }

    def describe(self, results: dict[str, list[Retrieval]]) -> list[str]:
        lines = []
        for name, lengths in results.items():
            lines.append(f"{name}: exact answers (one standard error), chance, nats of the answer (chance)")
            for r in lengths:
                low, high = r.accuracy.interval()
                lines.append(
                    f"  {r.length:>7,} tokens  {r.accuracy.value:6.1%} ({low:.1%} to {high:.1%}), "
                    f"chance {r.chance:.1%}   {r.answer_nats} ({r.chance_nats:.2f})"
                )
        return lines

    def draw(self, path: Path, results: dict[str, list[Retrieval]]) -> None:
        """Accuracy by length, nats of the answer by length, and for each model accuracy by length and depth."""
        first = next(iter(results.values()))
        lengths = [r.length for r in first]
        with picture(
            path, f"Values found again in a text of pairs; {BARS} (of shares: Wilson's)", height=7.5
        ) as figure:
            upper, lower = figure.subfigures(2, 1)
            accuracy, nats = upper.subplots(1, 2)
            draw_curves(accuracy, {name: {r.length: r.accuracy for r in of} for name, of in results.items()})
            draw_curves(nats, {name: {r.length: r.answer_nats for r in of} for name, of in results.items()})
            chance = {"label": "chance: any value of the document", "linestyle": "--", **REFERENCE}
            accuracy.plot(lengths, [r.chance for r in first], **chance)
            nats.plot(lengths, [r.chance_nats for r in first], **chance)
            guess = [math.log(10) * digits_for(r.pairs) for r in first]
            nats.plot(lengths, guess, label="chance: any digits", linestyle=":", **REFERENCE)
            accuracy.set_ylim(-0.03, 1.03)
            accuracy.set_ylabel("share of exact answers")
            nats.set_ylim(bottom=0)
            nats.set_ylabel("nats of the answer (lower is better)")
            for axes in (accuracy, nats):
                count_tokens(axes, lengths)
                axes.set_xlabel("tokens in the document")
            maps = lower.subplots(1, len(results), sharey=True, squeeze=False)[0]
            for axes, (name, of_lengths) in zip(maps, results.items(), strict=True):
                image = _draw_depths(axes, name, of_lengths)
            maps[0].set_ylabel("depth of the pair (0%: at the start)")
            lower.colorbar(image, ax=list(maps), label="share of exact answers")


def _choose_lengths(setup: Setup) -> list[int]:
    """The lengths that are asked for, or those of the defaults that every model can read."""
    asked = setup.arguments.retrieval_lengths
    lengths = sorted({length for length in asked or RETRIEVAL_LENGTHS if length >= 1})
    for subject in setup.subjects:
        too_long = [n for n in lengths if subject.limit is not None and n + ANSWER_ROOM > subject.limit]
        if not too_long:
            continue
        words = f"{', '.join(map(str, too_long))} tokens and an answer are more than the {subject.limit} positions of "
        words += subject.source
        if asked:
            setup.problems.append(f"--retrieval-lengths: {words}; use at most {subject.limit - ANSWER_ROOM}")
        else:
            setup.remarks.append(f"retrieval is measured at fewer lengths: {words}")
            lengths = [n for n in lengths if n not in too_long]
    return lengths


def _draw_depths(axes: Axes, name: str, of_lengths: list[Retrieval]) -> AxesImage:
    """A map of the accuracy, with its numbers."""
    columns = [[math.nan if p is None else p.value for p in r.by_depth()] for r in of_lengths]
    grid = np.array(columns).T
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(of_lengths)), [short_count(r.length) for r in of_lengths])
    axes.set_yticks(range(DEPTH_BINS), [f"{i / DEPTH_BINS:.0%}–{(i + 1) / DEPTH_BINS:.0%}" for i in range(DEPTH_BINS)])
    axes.set_xlabel("tokens in the document")
    axes.set_title(f"{name}: exact answers")
    axes.grid(False)
    return image
