"""What the models are trained on: documents of the key-value lines that task `retrieval` asks for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from ...common.files import atomic_file
from ...evaluation.needles import VALUE_DIGITS, draw_lines, write_line

PAIRS_OF_A_DOCUMENT = (1, 2, 4, 8)
SEED = 0


def write_texts(path: Path, megabytes: float) -> None:
    """JSON lines `{"text": ...}` of so many megabytes of text, always the same ones."""
    with atomic_file(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        size = 0
        for text in draw_texts(random.Random(SEED)):
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size >= megabytes * 1e6:
                return


def draw_texts(draw: random.Random) -> Iterator[str]:
    """Documents without end: 1 to 8 pairs of the task's keys and values, and then lines of the same pairs, drawn at
    random, twice as many and 8 more. Most of a line can be known, so that few tokens teach a small model to look."""
    while True:
        pairs = draw_lines(draw, draw.choice(PAIRS_OF_A_DOCUMENT), VALUE_DIGITS)
        lines = pairs + draw.choices(pairs, k=2 * len(pairs) + 8)
        yield "".join(map(write_line, lines))
