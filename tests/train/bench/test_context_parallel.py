"""`tnt bench context-parallel`: two processes on a tiny model, ranks that fail, and what is predicted for GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from modeling_tnt import TNTConfig
from modeling_tnt.context_parallel import boundary_bytes
from modeling_tnt.train.bench import context_parallel
from modeling_tnt.train.bench.arguments import ContextParallelBenchArguments
from modeling_tnt.train.bench.context_parallel import (
    ContextParallelBench,
    ContextPrediction,
    describe_cut,
    state_bytes,
    summarize_useful_ranks,
)
from modeling_tnt.train.bench.context_ranks import RankError, Ranks, Setup
from modeling_tnt.train.bench.predicted_parts import load_parts
from modeling_tnt.train.bench.rows import ContextRow
from modeling_tnt.train.common.timing import Refused


def test_it_measures_predicts_writes_and_prints(run, output_dir: Path, capsys):
    status, rows = run("context-parallel")
    assert status == 0
    assert [(row["contender"], row["length"]) for row in rows] == [
        (name, length) for length in (64, 512) for name in ("1 rank", "2 ranks")
    ]
    config = TNTConfig.from_preset("tiny")
    for row in rows:
        assert (row["status"], row["source"], row["threads"]) == ("ok", "measured", 1) and row["repeats"] >= 3
        crossing = 2 * config.num_hidden_layers * sum(boundary_bytes(config, row["length"] // 2).values())
        assert row["boundary_bytes"] == (crossing if row["ranks"] == 2 else 0)
        # What the ranks count is what the formula says, and nothing that grows with the length.
        assert row["sent_bytes_per_token"] * row["length"] == pytest.approx(row["boundary_bytes"])
        assert row["longest_part"] == row["length"] // row["ranks"]
        assert 0 <= row["wait_mean"] <= row["wait_longest"] < 1
        assert row["efficiency"] == pytest.approx(row["speed_up"] / row["ranks"])
        if row["ranks"] == 2:
            assert row["ratio"] == pytest.approx(row["ms_median"] / row["predicted_ms"])
            assert row["predicted_speed_up"] > 0 and 0 <= row["predicted_wait_longest"] < 1
        else:
            assert row["speed_up"] == 1 and row["predicted_ms"] is None
    printed = capsys.readouterr().out
    assert "measured beside predicted" in printed and "link between two ranks" in printed
    assert (output_dir / "context-parallel.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_are_cut_inside_of_shards(output_dir: Path):
    bench = ContextParallelBench(ContextParallelBenchArguments(device="cpu", output_dir=output_dir).resolve())
    config = bench.configs["auto"]
    assert describe_cut(config, 700, 1, bench.args) == {"longest_part": 700, "boundary_bytes": 0}
    # The global memory's weights and their anchors, and the same of the local one, whose shards have 256 tokens.
    assert list(state_bytes(config, 350, rows=1)) == ["global", "local0"]
    assert list(state_bytes(config, 512, rows=1)) == ["global"]


def test_no_time(run):
    status, rows = run("context-parallel", "--time-limit", "1e-9")
    assert status == 0 and {row["status"] for row in rows} == {"not run"}


def test_a_rank_that_fails_ends_the_benchmark(run, monkeypatch, capsys):
    class Failing:
        def __init__(self, setup: Setup):
            self.closed = False

        def start(self) -> None:
            pass

        def step(self, *args) -> None:
            raise RankError("rank 1: ValueError: no")

        def link(self) -> None:
            pass

        def cpu_seconds(self) -> float:
            return 0.0

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(context_parallel, "Ranks", Failing)
    status, rows = run("context-parallel")
    assert status == 1
    assert [row["status"] for row in rows] == ["failed", "failed", "not run", "not run"]
    assert {row["reason"] for row in rows} == {"RankError: rank 1: ValueError: no"}
    assert "1 rank T=64: failed: RankError: rank 1: ValueError: no" in capsys.readouterr().out


def test_another_loss_over_several_ranks_fails_the_gate(output_dir: Path):
    bench = ContextParallelBench(ContextParallelBenchArguments(device="cpu", output_dir=output_dir).resolve())
    bench._check_losses({1: 2.0, 2: 2.0001})
    for wrong in (2.1, float("nan")):
        with pytest.raises(Refused, match="over 2 ranks and 2.0 over one"):
            bench._check_losses({1: 2.0, 2: wrong})


def setup(**changes) -> Setup:
    config = TNTConfig.from_preset("tiny", num_hidden_layers=1, kernel_backend="torch")
    given = {"configs": {"torch": config}, "ranks": 2, "device": "cpu", "threads": 1, "precision": "fp32"}
    return Setup(**given | {"batch_size": 1, "seed": 0, "timeout": 60.0} | changes)


class Process:
    exitcode = -9

    def __init__(self) -> None:
        self.killed = False

    def join(self, seconds: float | None = None) -> None:
        pass

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def ranks() -> tuple[Ranks, list[connection.Connection]]:
    """Ranks without processes, and the other ends of their pipes."""
    made, pipes = object.__new__(Ranks), [multiprocessing.Pipe() for _ in range(3)]
    made.setup, made._folder = setup(ranks=3, timeout=0.2), SimpleNamespace(cleanup=lambda: None)
    made._processes, made._pipes = [Process() for _ in pipes], [ours for ours, _ in pipes]
    made._cpu_seconds = [0.0] * 3
    return made, [theirs for _, theirs in pipes]


def test_answers_come_in_the_order_of_ranks(ranks):
    ranks, pipes = ranks
    for rank in (1, 0):
        pipes[rank].send((None, f"answer {rank}", 2.5))
    assert ranks.step(2, "torch", 16) == ["answer 0", "answer 1"]
    assert [pipe.recv() for pipe in pipes[:2]] == [("step", ("torch", 16, 2))] * 2 and not pipes[2].poll()
    assert ranks.cpu_seconds() == 5.0


def test_the_first_cause_is_told_first(ranks):
    made, pipes = ranks
    pipes[0].send(("ContextParallelError: rank 1 is lost", None, 0.0))
    pipes[1].close()
    pipes[2].send(("ValueError: no", None, 0.0))
    with pytest.raises(RankError) as error:
        made.step(3, "torch", 16)
    assert str(error.value) == (
        "rank 1: ended with exit code -9; rank 2: ValueError: no; rank 0: ContextParallelError: rank 1 is lost"
    )
    assert all(process.killed for process in made._processes)


def test_a_rank_that_says_nothing_is_not_waited_for_longer_than_the_limit(ranks):
    made, pipes = ranks
    pipes[0].send((None, "answer", 0.0))
    with pytest.raises(RankError, match=r"rank 1: says nothing for 0.2 s; see --rank-timeout; rank 2: says nothing"):
        made.step(3, "torch", 16)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others():
    made = Ranks(setup())
    try:
        made.start()
        assert len(made.step(2, "torch", 64)) == 2
        os.kill(made._processes[1].pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankError, match="rank 1: ended with exit code -9"):
            made.step(2, "torch", 64)
        assert time.monotonic() - began < 30 and not any(process.is_alive() for process in made._processes)
    finally:
        made.close()


# --------------------------------------------------------------------------------------------------------- predictions


def test_predictions(run, output_dir: Path, capsys):
    lengths = [16384, 131072]
    status, rows = run("context-parallel", "--predict", "--ranks", "1", "2", "8", "--seq-lens", *map(str, lengths))
    assert status == 0 and {row["source"] for row in rows} == {"predicted"}
    assert [(row["length"], row["ranks"]) for row in rows] == [(T, n) for T in lengths for n in (1, 2, 8)]
    whole = load_parts("tnt-150m").whole
    for row in rows:
        assert row["ms_median"] is None and row["longest_part"] * row["ranks"] == row["length"]
        alone = 1e3 * whole.at(row["length"]).total(12)
        assert row["predicted_speed_up"] == pytest.approx(alone / row["predicted_ms"])
        # 12 heads of 64 x 128 numbers twice, and three inputs of a convolution, float32, in 12 layers and both passes.
        crossing = 0 if row["ranks"] == 1 else 2 * 12 * 4 * (12 * 2 * 64 * 128 + 3 * 3 * 12 * 64)
        assert row["boundary_bytes"] == pytest.approx(crossing, rel=0.02)  # biases are not counted here
        assert 0 <= row["predicted_wait_mean"] <= row["predicted_wait_longest"] <= row["predicted_speed_up"]
        assert row["predicted_wait_mean"] <= row["predicted_idle"] + 1e-9
        assert row["efficiency"] <= 1 + 1e-9
    printed = capsys.readouterr().out
    assert "not measured and not calibrated" in printed and "largest number of ranks, predicted" in printed
    assert (output_dir / "context-parallel.png").exists()


def test_a_slow_link_makes_more_ranks_slower(run):
    flags = ["--predict", "--ranks", "8", "--seq-lens", "131072", "--overwrite"]
    (_, fast), (_, slow) = (
        run("context-parallel", *flags)[1],
        run("context-parallel", *flags, "--link-gigabytes", "1")[1],
    )
    # Seven ranks lag by a state each in both passes: 16 µs of 786 kB become 786.
    assert slow["predicted_ms"] - fast["predicted_ms"] == pytest.approx(2 * 7 * 0.77, rel=0.05)


def test_a_rank_has_at_least_a_global_chunk(run, output_dir: Path):
    args = ContextParallelBenchArguments(predict=True, output_dir=output_dir).resolve()
    prediction = ContextPrediction(args)
    assert prediction._doublings(2048) == [1] and prediction._doublings(16384) == [1, 2, 4, 8]
    status, rows = run("context-parallel", "--predict", "--ranks", "2", "16", "--seq-lens", "16384")
    assert status == 0 and [row["status"] for row in rows] == ["ok", "ok", "cannot run"]
    assert rows[-1]["reason"] == "parts of 1024 tokens are not predicted, only multiples of 2048"


def test_useful_ranks_as_text():
    def row(length: int, ranks: int, speed_up: float) -> ContextRow:
        return ContextRow("", length, 1, "ok", ranks=ranks, predicted_speed_up=speed_up, predicted_ms=8 / speed_up)

    rows = [row(4096, 2, 1.5), row(4096, 4, 2.0), row(4096, 8, 3.0), row(8192, 2, 1.7), row(8192, 4, 1.9)]
    lines = [line.split() for line in summarize_useful_ranks(rows).splitlines()[2:4]]
    assert lines == [["4,096", "1", "4", "4"], ["8,192", "2", "2", "4.706"]]
