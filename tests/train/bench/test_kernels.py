"""`tnt bench kernels` at sizes that take no time: what it measures, writes and prints, and its peers."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling_tnt.train.bench import contenders, kernels
from modeling_tnt.train.bench.arguments import KernelBenchArguments
from modeling_tnt.train.bench.contenders import Attention, Case, FlaTttLinear
from modeling_tnt.train.bench.measure import Timing, Work
from modeling_tnt.train.bench.predicted import load_predictions
from modeling_tnt.train.common.costs import BOTH
from modeling_tnt.train.common.timing import MISSING, NOT_RUN, OK, Outcome, Refused


def test_kernels_measures_writes_and_prints(run, output_dir: Path, capsys):
    more = ["--memories", "mlp", "linear", "--peers", "fla", "flash", "cudnn", "--chunk-sizes", "16", "8"]
    status, rows = run("kernels", *more)
    assert status == 0
    # Two memories at two chunk sizes, fla at two, flash and cudnn without chunks; each at two lengths in two modes.
    assert len(rows) == (2 * 2 + 2 + 2) * 2 * 2
    timed = [row for row in rows if row["status"] == "ok"]
    assert {(row["contender"], row["memory"]) for row in timed} == {
        ("torch", "mlp"),
        ("torch", "linear"),
        ("flash", ""),
    }
    for row in timed:
        assert float(row["ms_lowest"]) <= float(row["ms_median"]) <= float(row["ms_highest"])
        assert float(row["tokens_per_second"]) == pytest.approx(64e3 / float(row["ms_median"]))
        seconds = float(row["ms_median"]) / 1e3
        assert float(row["operations_per_second"]) == pytest.approx(int(row["operations"]) / seconds)
        assert float(row["bytes_per_second"]) == pytest.approx(int(row["bytes_moved"]) / seconds)
        assert int(row["batch"]) * int(row["length"]) == 64
    assert all(0 < float(row["gate_error"]) < 1e-3 for row in timed if row["contender"] == "torch")
    assert (output_dir / "kernels.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert "fla: missing: runs on cuda only, not on cpu" in printed
    assert "cudnn: missing: runs on cuda only, not on cpu" in printed
    assert "torch: 4 of 4 memory types and chunk sizes passed, worst" in printed


@pytest.mark.slow
def test_bf16(run):
    status, rows = run("kernels", "--dtype", "bf16", "--peers", "flash")
    assert status == 0 and {row["status"] for row in rows} == {"ok"}


def test_a_missing_peer_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    status, rows = run("kernels", "--peers", "titans")
    assert status == 0
    missing = [row for row in rows if row["contender"] == "titans"]
    assert len(missing) == 4 and {row["status"] for row in missing} == {"missing"}
    assert all("pip install titans-pytorch" in row["reason"] for row in missing)
    assert "titans: missing: titans-pytorch cannot be imported" in capsys.readouterr().out


def test_titans(run):
    pytest.importorskip("titans_pytorch")
    _, rows = run("kernels", "--peers", "titans", "--lengths", "64", "--modes", BOTH)
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[1]["contender"] == "titans"


def test_fla_gets_shards_as_rows_and_our_weights_as_its_state(run, monkeypatch):
    """What the package's signature asks for, in its layout; without a GPU the kernel itself cannot run."""
    calls = []

    def chunk_ttt_linear(q, k, v, w, b, eta, scale=None, eps=1e-6, chunk_size=16, initial_state=None,
                         initial_state_bias=None):  # fmt: skip
        calls.append((q.shape, w.shape, b.shape, eta.shape, initial_state.shape, initial_state_bias.shape, chunk_size))
        assert w.dtype == b.dtype == eta.dtype == q.dtype  # its backward does not compile otherwise
        state, bias = initial_state.sum((0, 1)).to(q.dtype), initial_state_bias.sum().to(q.dtype)
        o = q @ state + bias + k + v * eta + w * b
        return o, None, None

    ttt = types.ModuleType("fla.ops.ttt")
    ttt.chunk_ttt_linear = chunk_ttt_linear
    monkeypatch.setitem(sys.modules, "fla.ops.ttt", ttt)
    monkeypatch.setattr(FlaTttLinear, "devices", ("cpu",))
    more = ["--memories", "linear", "--peers", "fla", "--heads", "2", "--lengths", "64", "--modes", BOTH]
    _, rows = run("kernels", *more, "--dtype", "bf16")
    ours, fla = rows
    assert ours["status"] == fla["status"] == "ok"
    assert ours["operations"] == fla["operations"] and ours["shard_length"] == fla["shard_length"] == "32"
    shapes = ((2, 32, 2, 16), (2, 16), (2, 16), (2, 32, 2, 1), (2, 2, 16, 16), (2, 2, 1, 16), 16)
    assert set(calls) == {shapes}


def test_attention_is_the_named_kernel_and_causal(monkeypatch):
    args = KernelBenchArguments(device="cpu", lengths=[64], tokens=128, heads=2, head_dim=16).resolve()
    (attention,) = (one for one in contenders.make_contenders(args) if one.name == "flash")
    assert isinstance(attention, Attention)
    work = attention.prepare(Case("flash", None, None, 64, BOTH), args, torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in work.leaves)
    scores = (q @ k.mT / 4).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(work.forward(), (scores.softmax(-1) @ v).transpose(1, 2))


def test_what_is_not_finite_is_no_time_of_ours_and_a_remark_on_a_peer(run, monkeypatch, capsys):
    def broken(prepare):
        def wrapped(*args):
            work = prepare(*args)
            return work._replace(forward=lambda: work.forward() / 0)

        return wrapped

    for contender in (contenders.OurMemory, Attention):
        monkeypatch.setattr(contender, "prepare", broken(contender.prepare))
    _, rows = run("kernels", "--peers", "flash", "--modes", BOTH, "--lengths", "32")
    ours, peer = rows
    assert (ours["status"], ours["reason"]) == ("failed", "FloatingPointError: its output is not finite")
    assert (peer["status"], peer["reason"]) == ("ok", "its output is not finite") and peer["ms_median"]
    assert "flash T=32: timed, but its output is not finite" in capsys.readouterr().out


def quick_run(monkeypatch, folder: Path, factor: float, **sizes) -> str:
    """The report of a quick run on a GPU in which every call takes `factor` times what is predicted, else 7 ms."""
    predictions = load_predictions()
    args = KernelBenchArguments(
        device="cpu", backends=["triton"], peers=["none"], memories=["mlp"], lengths=[2048, 32768], chunk_sizes=[16],
        modes=[BOTH], dtype="bf16", heads=12, shard_length=2048, quick=True, case_seconds=0.01, seed=0,
        output_dir=folder,
    )  # fmt: skip
    bench = kernels.KernelBench(replace(args, **{"tokens": 131072} | sizes))

    def prepared(case):
        row = bench._row(case, Outcome(NOT_RUN))
        timing = Timing.of([factor * (predictions.ms_of(row) or 7.0) / 1e3], 0)
        return Work(lambda: None, lambda _: timing.fields(bench.args.tokens))

    monkeypatch.setattr(bench, "_prepare", prepared)
    rows = list(bench.rows())
    bench.args = replace(bench.args, device="cuda")
    return bench.report(rows)


def test_a_quick_run_prints_measured_beside_predicted(output_dir: Path, monkeypatch):
    report = quick_run(monkeypatch, output_dir, 2.0)
    table = report[report.index("measured on ") :].splitlines()
    assert "beside predicted for an NVIDIA H100 SXM at 1.755 GHz, not calibrated" in table[0]
    lines = [line.split() for line in table[2:] if line]
    assert [line[:5] for line in lines] == [["triton", "mlp", "C=16", T, "forward+backward"] for T in ("2048", "32768")]
    (entry,) = [e for e in load_predictions().entries if (e["contender"], e["memory"], e["chunk_size"], e["mode"])
                == ("triton", "mlp", 16, BOTH)]  # fmt: skip
    for line in lines:
        assert float(line[5]) == pytest.approx(2 * entry["ms"], rel=1e-2)
        assert float(line[6]) == pytest.approx(entry["ms"], rel=1e-2)
        assert line[7] == "2.00"


def test_backends_stand_side_by_side_and_a_missing_one_is_asked_once(output_dir: Path, monkeypatch):
    args = KernelBenchArguments(
        device="cpu", backends=["triton", "torch"], peers=["flash"], memories=["mlp"], lengths=[64, 128], tokens=128,
        modes=[BOTH], chunk_sizes=[16, 8], case_seconds=1e-3, output_dir=output_dir,
    ).resolve()  # fmt: skip
    asked = []

    def prepared(case):
        asked.append(case.contender)
        if case.contender == "triton":
            raise Refused(MISSING, "not here")
        return Work(lambda: None, lambda timing: timing.fields(args.tokens))

    bench = kernels.KernelBench(args)
    monkeypatch.setattr(bench, "_prepare", prepared)
    rows = list(bench.rows())
    ours = [(name, T, C) for C in (16, 8) for T in (64, 128) for name in ("triton", "torch")]
    flash = [("flash", T, None) for T in (64, 128)]
    assert [(row.contender, row.length, row.chunk_size) for row in rows] == [*ours[:4], *flash, *ours[4:]]
    assert {row.contender: row.status for row in rows} == {"triton": MISSING, "torch": OK, "flash": OK}
    assert asked.count("triton") == 1 and asked.count("torch") == 4


@pytest.mark.parametrize("sizes", [{"tokens": 65536}, {"heads": 8}, {"dtype": "fp16"}, {"shard_length": 1024}])
def test_other_sizes_than_the_predicted_ones_have_no_prediction(output_dir: Path, monkeypatch, sizes):
    report = quick_run(monkeypatch, output_dir, 1.0, **sizes)
    assert "none of the cases that were timed is predicted; predictions are for the default sizes" in report


@pytest.mark.slow
def test_a_quick_run_without_a_gpu_says_what_the_comparison_needs(run, capsys):
    assert run("kernels", "--quick", "--lengths", "32")[0] == 0
    (message,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("measured beside predicted")]
    assert "needs a GPU, this run used the CPU" in message and "NVIDIA H100" in message
    assert run("kernels", "--lengths", "32", "--overwrite")[0] == 0
    assert "measured beside predicted" not in capsys.readouterr().out
