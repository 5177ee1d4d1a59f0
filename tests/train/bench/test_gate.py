"""The correctness gate of `tnt bench kernels`: a wrong backend is not timed, and the exit status says so."""

from __future__ import annotations

import pytest
import torch

from modeling_tnt.kernels import local_memory
from modeling_tnt.train.bench import contenders, gate
from modeling_tnt.train.bench.arguments import KernelBenchArguments
from modeling_tnt.train.bench.gate import Gate, worst_error
from modeling_tnt.train.common import timing
from modeling_tnt.train.common.costs import BOTH


def wrong_backend(monkeypatch, change):
    """`change` what the torch backend returns: o, q → another o."""

    def wrong(q, *args, backend, **options):
        o, state = local_memory(q, *args, backend=backend, **options)
        return (change(o, q) if backend == "torch" else o), state

    monkeypatch.setattr(contenders, "local_memory", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda o, q: o + 0.01 * o.detach(), "output"),
        (lambda o, q: o + 0.01 * (q - q.detach()), "q"),
        (lambda o, q: torch.where(torch.arange(o.shape[1])[:, None, None] == 5, torch.nan, o), "output"),
        (lambda o, q: o.detach() + 0 * q, "k"),
    ],
    ids=["output", "gradient", "nan", "no gradient"],
)
def test_the_gate_stops_a_wrong_backend(run, monkeypatch, capsys, change, where: str):
    wrong_backend(monkeypatch, change)
    status, rows = run("kernels", "--peers", "flash", "--modes", BOTH)
    assert status == 1
    assert {(row["contender"], row["status"]) for row in rows} == {("torch", "gate failed"), ("flash", "ok")}
    assert all(f"‖x − reference‖ / ‖reference‖ of {where} is" in row["reason"] for row in rows[:2])
    assert not any(row["tokens_per_second"] for row in rows[:2])
    assert "torch mlp C=16: gate failed" in capsys.readouterr().out


def test_a_backend_that_crashes_fails_the_gate(run, monkeypatch, capsys):
    def crash(o, q):
        raise RuntimeError("a kernel went wrong\nwith details")

    wrong_backend(monkeypatch, crash)
    status, rows = run("kernels")
    assert status == 1 and {row["status"] for row in rows} == {"gate failed"}
    assert "gate failed: failed: RuntimeError: a kernel went wrong" in capsys.readouterr().out


def test_a_backend_that_loses_the_device_fails_the_gate(run, monkeypatch, capsys):
    def crash(o, q):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def dead(device, reason):
        raise timing.DeviceLostError(f"the device answers no more after this: {reason}")

    wrong_backend(monkeypatch, crash)
    monkeypatch.setattr(timing, "_check_alive", dead)
    status, rows = run("kernels", "--peers", "flash")
    assert status == 1 and {row["status"] for row in rows} == {"not run"}
    assert "torch mlp C=16: gate failed: the device answers no more after this" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError, ImportError])
def test_a_backend_that_says_what_it_cannot_is_no_failure(run, monkeypatch, capsys, error: type):
    def refuse(o, q):
        raise error("head_dim=16 is not supported")

    wrong_backend(monkeypatch, refuse)
    status, rows = run("kernels")
    assert status == 0 and {row["status"] for row in rows} == {"cannot run"}
    assert "torch mlp C=16 T=32 and 3 more: cannot run: head_dim=16 is not supported" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gate_reads_across_resets_and_many_chunks(monkeypatch):
    monkeypatch.setattr(gate, "SHORTEST_SHARD", 128)
    args = KernelBenchArguments(device="cpu", heads=1, head_dim=8).resolve()
    checked = Gate(args, torch.Generator().manual_seed(0))
    assert checked.check("torch", "mlp", 1).status == "ok"
    (inputs, *_), *_ = checked._problems.values()
    assert inputs.q.shape == (1, 128 + 1 + 1, 1, 8)


def test_worst_error_of_nan():
    want = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    error, where = worst_error(want | {"b": torch.tensor([1.0, torch.nan]), "c": torch.zeros(2)}, want)
    assert error != error and where == "b"
    assert worst_error(want | {"c": torch.full((2,), 1.5)}, want) == (0.5, "c")
