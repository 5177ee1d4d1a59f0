"""Which tasks suit the models that are evaluated, and at which lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .arguments import RETRIEVAL_LENGTHS, TASKS, EvalArguments
from .chunks import scale_chunks
from .needles import Needle, NeedleFactory
from .subjects import Subject

ANSWER_ROOM = 16  # tokens kept free behind a document for its answer


class Choice(NamedTuple):
    """The tasks in the order of `TASKS`, the lengths of the retrieval's documents, and remarks on what is left out."""

    tasks: list[str]
    retrieval_lengths: list[int]
    remarks: list[str]


def choose_tasks(arguments: EvalArguments, subjects: list[Subject], problems: list[str]) -> Choice:
    """What is asked for and what of it cannot be done: a problem where it was named, or else left out with a remark."""
    tasks, remarks = [task for task in TASKS if task in (arguments.tasks or TASKS)], []
    impossible: dict[str, str] = {}
    if "chunks" in tasks:
        without = next(_find_models_without_chunks(subjects), None)
        if without is not None:
            impossible["chunks"] = without
        else:
            problems += _find_wrong_chunk_sizes(arguments, subjects)
    lengths = _choose_lengths(arguments, subjects, problems, remarks) if "retrieval" in tasks else []
    if "retrieval" in tasks and not lengths:
        impossible["retrieval"] = "no document is short enough; give --retrieval-lengths"
    for task, why in impossible.items():
        tasks.remove(task)
        if task in arguments.tasks:
            problems.append(f"--tasks {task} cannot be done: {why}")
        else:
            remarks.append(f"the task {task} is left out: {why}")

    for subject in subjects:
        if subject.limit is not None and arguments.seq_len > subject.limit:
            problems.append(
                f"--seq-len {arguments.seq_len} is more than the {subject.limit} positions of {subject.source}; "
                "use at most that"
            )
        longest = max([arguments.seq_len, *lengths])
        if subject.longest is not None and longest > subject.longest:
            remarks.append(f"{subject.source} was made for {subject.longest:,} tokens and reads up to {longest:,} here")
    return Choice(tasks, lengths, remarks)


def _find_models_without_chunks(subjects: list[Subject]) -> Iterator[str]:
    for subject in subjects:
        if not subject.is_tnt:
            yield f"{subject.source} is a {subject.config.model_type} model, and only TNT models have chunks"
        elif not subject.config.local_chunk_sizes:
            yield f"{subject.source} has no local memory whose chunks could be changed"


def _find_wrong_chunk_sizes(arguments: EvalArguments, subjects: list[Subject]) -> Iterator[str]:
    for subject in subjects:
        for size in arguments.chunk_sizes:
            try:
                if size >= 1:  # another is a problem that the arguments report themselves
                    scale_chunks(subject.config, size)
            except ValueError as error:
                yield f"--chunk-sizes with {subject.source}: {error}"


def _choose_lengths(
    arguments: EvalArguments, subjects: list[Subject], problems: list[str], remarks: list[str]
) -> list[int]:
    lengths = sorted({length for length in arguments.retrieval_lengths or RETRIEVAL_LENGTHS if length >= 1})
    for subject in subjects:
        too_long = [n for n in lengths if subject.limit is not None and n + ANSWER_ROOM > subject.limit]
        if not too_long:
            continue
        words = f"{', '.join(map(str, too_long))} tokens and an answer are more than the {subject.limit} positions of "
        if arguments.retrieval_lengths:
            problems.append(f"--retrieval-lengths: {words}{subject.source}; use at most {subject.limit - ANSWER_ROOM}")
        else:
            remarks.append(f"retrieval is measured at fewer lengths: {words}{subject.source}")
            lengths = [n for n in lengths if n not in too_long]
    return lengths


def make_needles(
    arguments: EvalArguments, lengths: list[int], tokenizer: PreTrainedTokenizerBase, problems: list[str]
) -> dict[int, list[Needle]]:
    """The documents of each length; a length without room for a question is a problem."""
    factory, needles = NeedleFactory(tokenizer, max(0, arguments.seed)), {}
    for length in lengths:
        try:
            needles[length] = factory.make(length, arguments.retrieval_documents)
        except ValueError as error:
            problems.append(f"--retrieval-lengths: {error}")
    return needles
