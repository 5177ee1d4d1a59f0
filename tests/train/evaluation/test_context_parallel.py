"""Two processes that read each row together give the scores of one. This file is what they run, too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import Dataset

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.train.evaluation.scores import TokenLosses, iterate_losses, score_rows
from modeling_tnt.train.loop.distributed import wrap

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "initializer_range": 0.3}
MODELS = {
    "tnt": {"global_chunk_size": 16, "local_chunk_sizes": [4, 2], "local_shard_lengths": 8, "use_momentum": True},
    "titans": {"global_chunk_size": None, "local_chunk_sizes": [4], "local_shard_lengths": None},
}


class Rows(Dataset):
    """Five rows of random tokens, or with `marked` of two sequences each."""

    def __init__(self, length: int, marked: bool = False):
        generator = torch.Generator().manual_seed(length)
        self.ids = torch.randint(3, 60, (5, length), generator=generator)
        self.starts = [1 + 5 * i % (length - 1) for i in range(5)] if marked else []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": self.ids[i], "labels": self.ids[i].clone()}
        if self.starts:
            row["seq_idx"] = (torch.arange(len(self.ids[i])) >= self.starts[i]).long()
            row["labels"][self.starts[i]] = -100
        return row

    def token_bytes(self, i: int) -> torch.Tensor:
        return self.ids[i].float()


# Columns of a row, and the multiple that parts are of: a cut in the middle of shards and chunks; nothing left for the
# second process; and a second part whose only column predicts nothing.
ROWS = {"middle": (22, None), "empty": (16, 16), "last": (17, 16)}


def build(name: str) -> TNTForCausalLM:
    torch.manual_seed(0)
    return TNTForCausalLM(TNTConfig(**SMALL, num_heads=2, head_dim=16, **MODELS[name]))


def cases() -> Iterator[tuple[str, str, Rows, int | None]]:
    for model in MODELS:
        for name, (length, multiple) in ROWS.items():
            for marked in (False, True):
                yield f"{model}, {name}{', marked' if marked else ''}", model, Rows(length, marked), multiple


def score_in_process(folder: Path) -> None:
    """Write this process's losses of every case, and of a wrapped model."""
    accelerator, results = Accelerator(cpu=True), {}
    for case, name, rows, multiple in cases():
        model = build(name)
        model.enable_context_parallel(dist.group.WORLD, part_multiple=multiple)
        results[case] = [losses._asdict() for losses in iterate_losses(model, rows, batch_size=3)]
    for sharding in ("none", "fsdp2"):
        model = build("tnt")
        model.enable_context_parallel(dist.group.WORLD)
        results[sharding] = score_rows(wrap(model, accelerator, sharding), Rows(22), batch_size=2).nats
    torch.save(results, folder / f"{accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of two processes wrote."""
    folder = tmp_path_factory.mktemp("scores")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_every_process_gets_the_losses_of_whole_rows(results, case):
    name, model, rows, _ = case
    wanted = list(iterate_losses(build(model), rows, batch_size=3))
    for theirs in results:
        assert len(theirs[name]) == len(wanted)
        for got, want in zip((TokenLosses(**losses) for losses in theirs[name]), wanted, strict=True):
            # Float32 sums of another order, in two layers.
            torch.testing.assert_close(got.nats, want.nats, rtol=1e-5, atol=1e-5)
            for x, y in zip(got[1:], want[1:], strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_model_is_found_behind_its_wrapper(results, sharding):
    wanted = score_rows(build("tnt"), Rows(22), batch_size=2).nats
    for theirs in results:
        torch.testing.assert_close(theirs[sharding], wanted, rtol=1e-5, atol=0)


if __name__ == "__main__":
    score_in_process(Path(sys.argv[1]))
