"""The benchmark runs at sizes that take no time, and counts what it says it counts."""

import importlib.util
import json
from pathlib import Path

import pytest

from modeling_tnt.train.common import machine

SCRIPT = Path(__file__).with_name("bench_memory.py")
TINY = ["--length", "40", "--batch", "1", "--heads", "2", "--head-dim", "8", "--shard-length", "16", "--repeats", "2"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def known_rate(bench, monkeypatch):
    """Measuring the machine takes longer than everything else here."""
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1e9)


def test_a_machine_that_is_not_idle_is_told(bench, monkeypatch, tmp_path: Path, capsys):
    class Busy:
        def cpus(self) -> float:
            return 1.25

    monkeypatch.setattr(bench, "look_around", lambda: 0.75)
    monkeypatch.setattr(bench, "OtherProcesses", Busy)
    monkeypatch.setattr(machine, "count_cpus", lambda: 2)
    out = tmp_path / "numbers.json"
    bench.main([*TINY, "--contenders", "ours", "--chunk-sizes", "4", "--no-peak", "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["cpus_used_by_others"] == 1.25
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("0.8 of 2 CPUs busy with other processes: these times are too long")
    assert lines[-1].startswith("1.2 of 2 CPUs busy with other processes (1.2 in the worst measurement): these times")


def test_it_runs_and_writes_its_numbers(bench, tmp_path: Path, capsys):
    out = tmp_path / "numbers.json"
    bench.main([*TINY, "--contenders", "ours", "--chunk-sizes", "4", "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["contender"] == "ours"
    assert row["tokens_per_second_lowest"] <= row["tokens_per_second"] <= row["tokens_per_second_highest"]
    assert row["peak_bytes"] >= 0 and row["operations_per_second"] > 0
    assert "GFLOP/s" in capsys.readouterr().out


def test_momentum_and_decay_run_too(bench, capsys):
    bench.main([*TINY, "--only", "ours", "--chunk-sizes", "4", "--no-peak"])
    assert "ours+gates" in capsys.readouterr().out


def test_a_missing_peer_is_named(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PEER", "a_package_that_is_not_there")
    bench.main([*TINY, "--chunk-sizes", "4", "--no-peak", "--contenders", "ours", "peer"])
    assert "peer is missing: titans-pytorch is not installed" in capsys.readouterr().out


def test_backends_are_compared_in_turns(bench, monkeypatch, tmp_path: Path, capsys):
    called, right = [], bench.local_memory

    def watched(*args, **options):
        called.append(options["backend"])
        return right(*args, **options)

    monkeypatch.setattr(bench, "local_memory", watched)
    out = tmp_path / "numbers.json"
    backends = ["--backends", "torch", "reference"]
    bench.main([*TINY, "--contenders", "operation", "--chunk-sizes", "4", "--no-peak", *backends, "--json", str(out)])
    assert called == ["torch", "reference"] * 3  # to warm up, and the repeats
    rows = json.loads(out.read_text())["rows"]
    assert [(row["contender"], row["backend"]) for row in rows] == [("operation", "torch"), ("operation", "reference")]
    ratio = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    assert f" {ratio:.2f} " in next(x for x in capsys.readouterr().out.splitlines() if "operation reference" in x)


def test_a_wrong_backend_is_not_timed(bench, monkeypatch):
    right = bench.local_memory

    def wrong(*args, **options):
        o, state = right(*args, **options)
        return (o * 1.01 if options["backend"] == "torch" else o), state

    monkeypatch.setattr(bench, "local_memory", wrong)
    with pytest.raises(RuntimeError, match="is wrong by .* at chunk size 4; not timed"):
        bench.main([*TINY, "--chunk-sizes", "4", "--no-peak", "--only", "ours", "--backends", "torch"])


def test_operations(bench):
    args = bench.parse(["--qk-projection", "none"])
    tokens_and_heads = 2 * 2048 * 4
    assert bench.operations(args, 16, "operation") == tokens_and_heads * (52 * 64 * 128 + 16 * 16 * 192)
    gates = bench.operations(args, 16, "ours+gates") - bench.operations(args, 16, "ours")
    assert gates == tokens_and_heads * 28 * 64 * 128
    around = bench.operations(args, 16, "ours") - bench.operations(args, 16, "operation")
    assert around == 2 * 2048 * 3 * 4 * 2 * 256**2  # four square projections, three products each
