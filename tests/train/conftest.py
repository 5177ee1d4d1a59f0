"""A model and a run so small that a whole two-stage training takes a second or two."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hub"))  # for hub_server

WORDS = "the memory reads one token and then another while it learns to forget what no longer helps".split()


TINY_MODEL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 64,
    "global_chunk_size": 32, "local_chunk_sizes": "[8]", "local_shard_lengths": 32,
}  # fmt: skip
TINY_RUN = {
    "--stages.stage1.steps": 6, "--training.batch-size": 2, "--training.seq-len": 64, "--output.checkpoint-every": 2,
    "--output.health-every": 3, "--output.eval-tokens": 256, "--output.prompt-tokens": 24, "--output.sample-tokens": 20,
    "--data.validation-share": 0.2,
}  # fmt: skip


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Ten text files of about 1,000 bytes each."""
    folder = tmp_path / "text"
    folder.mkdir()
    draw = random.Random(0)
    for i in range(10):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(190)), encoding="utf-8")
    return folder


@pytest.fixture
def flags(text_folder: Path, tmp_path: Path) -> list[str]:
    """The command line of a run of 6 + 1 steps of a model with 20,000 parameters; a later flag replaces its value."""
    files = {
        "--data.sources": text_folder, "--output.dir": tmp_path / "run", "--data.cache-dir": tmp_path / "cache"
    }  # fmt: skip
    given = [str(part) for pair in (files | TINY_RUN).items() for part in pair]
    return ["train", *given, "--model.override", *(f"{k}={v}" for k, v in TINY_MODEL.items())]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: a second thread costs more than it does, and results do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its settings for the life of a process; a test with other ones starts and leaves it without."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
