"""`tnt bench decode` at contexts that take no time: what stands in a cache, what is measured, written and printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_tnt.cache import is_memory_layer
from modeling_tnt.train.bench import decode
from modeling_tnt.train.bench.arguments import DecodeBenchArguments
from modeling_tnt.train.bench.decode import DYNAMIC, STATIC, TNT, DecodeBench, summarize_decode
from modeling_tnt.train.bench.rows import DecodeRow


def test_it_measures_writes_and_prints(bench, run, output_dir: Path, capsys):
    status, rows = run("decode")
    assert status == 0
    assert [(row["contender"], row["length"]) for row in rows] == [
        (name, context) for context in (16, 256) for name in (TNT, DYNAMIC, STATIC)
    ]
    for row in rows:
        assert row["status"] == "ok" and row["repeats"] >= 3
        assert row["ms_lowest"] <= row["ms_median"] <= row["ms_highest"]
        peers = [r["ms_median"] for r in rows if r["length"] == row["length"] and r["contender"] != TNT]
        assert row["relative"] == pytest.approx(row["ms_median"] / min(peers))
    size = {(row["contender"], row["length"]): row["cache_bytes"] for row in rows}
    assert size[TNT, 16] == size[TNT, 256]
    assert size[DYNAMIC, 256] == 2 * 3 * 256 * 128 * 4  # keys and values, layers, tokens, width, float32
    assert size[STATIC, 256] == 2 * 3 * 257 * 128 * 4
    printed = capsys.readouterr().out
    assert "TNT's median step as a multiple" in printed and "cache, MiB" in printed
    assert (output_dir / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert bench("decode") == 2
    assert "holds decode.json, decode.png; give another folder, or --overwrite" in capsys.readouterr().err


def test_a_cache_that_does_not_fit_is_left_out_with_its_size(run, capsys):
    _, rows = run("decode", "--memory-limit", "0.0002", "--contexts", "16", "1048576", "--dtype", "bf16")
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["out of memory"] * 2
    assert rows[-1]["cache_bytes"] == 2 * 3 * 2**20 * 128 * 2
    # One layer more with a DynamicCache, which copies one at every token.
    assert rows[-2]["reason"] == "a KV cache of 2.0 GiB is over the limit of 0.0 GiB"
    assert rows[-1]["reason"] == "a KV cache of 1.5 GiB is over the limit of 0.0 GiB"
    assert "out of memory" in capsys.readouterr().out


def test_no_time_and_a_step_that_fails(run, monkeypatch):
    _, rows = run("decode", "--time-limit", "1e-9", "--peer", "none")
    assert [row["status"] for row in rows] == ["not run"] * 2 and "time limit" in rows[0]["reason"]
    step = DecodeBench._step

    def fail(self, contender):
        if contender.name == STATIC:
            raise RuntimeError("broken\nwith details")
        return step(self, contender)

    monkeypatch.setattr(DecodeBench, "_step", fail)
    _, rows = run("decode", "--overwrite", "--contexts", "16")
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("ok", ""),
        ("ok", ""),
        ("failed", "RuntimeError: broken"),
    ]


def test_backends_are_contenders_of_their_own(run, capsys):
    _, rows = run("decode", "--backends", "torch", "auto", "--contexts", "16")
    names = ["tnt torch", "tnt auto", DYNAMIC, STATIC]
    assert [row["contender"] for row in rows] == names and rows[0]["backend"] == "torch" and rows[2]["backend"] == ""
    assert {row["status"] for row in rows} == {"ok"}
    peer = min(row["ms_median"] for row in rows[2:])
    assert [row["relative"] for row in rows] == pytest.approx([row["ms_median"] / peer for row in rows])
    printed = capsys.readouterr().out
    assert all(f"TNT's median step as a multiple, {backend} backend" in printed for backend in ("torch", "auto"))


def test_a_backend_that_cannot_step_here_is_no_traceback(bench, monkeypatch, capsys):
    def refuse(backend, params):
        raise ValueError(f'backend="{backend}" cannot run this step')

    monkeypatch.setattr(decode, "choose_step_backend", refuse)
    assert bench("decode", "--backends", "triton") == 2
    assert 'error: backend="triton" cannot run this step' in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["tiny-hybrid", "tiny-mac", "tiny-mag"])
@torch.no_grad()
def test_a_hybrid_stands_at_the_context_and_stays_there(preset: str, output_dir: Path):
    given = {"device": "cpu", "contexts": [300], "read": 20, "preset": preset, "peer": "none"}
    bench = DecodeBench(DecodeBenchArguments(**given, output_dir=output_dir).resolve())
    ready = bench._prepare(TNT, 300)
    layers = ready.cache.layers
    assert ready.cache.get_seq_length() == 300
    assert [layer.get_seq_length() for layer in layers if not is_memory_layer(layer)] == [300] * (
        preset == "tiny-hybrid"
    )
    assert {layer.window.cumulative_length for layer in layers if getattr(layer, "window", None)} <= {300}
    bench._step(ready)
    assert decode._held_bytes(ready.cache) == ready.cache_bytes
    grown = bench._prepare(TNT, 400).cache_bytes - ready.cache_bytes
    assert grown == (2 * 100 * 128 * 4 if preset == "tiny-hybrid" else 0)  # keys and values, tokens, width, float32
    assert bench._needed_bytes(TNT, 400) == (2 * 2 * 400 * 128 * 4 if preset == "tiny-hybrid" else 0)


@torch.no_grad()
def test_every_contender_stands_at_the_context(output_dir: Path):
    bench = DecodeBench(DecodeBenchArguments(device="cpu", contexts=[300], read=20, output_dir=output_dir).resolve())
    for name in (TNT, DYNAMIC, STATIC):
        contender = bench._prepare(name, 300)
        for step in range(2):
            # A KV cache is cropped behind each step; what a memory has learned stays.
            assert int(contender.cache.get_seq_length()) == (300 + step if name == TNT else 300)
            bench._step(contender)
        if name == TNT:
            assert {s.position.item() for s in contender.cache.layers[0].memories.values()} == {302}


def test_summary():
    def row(name: str, context: int, ms: float, relative: float | None) -> DecodeRow:
        return DecodeRow(name, context, 1, "ok", ms_median=ms, relative=relative)

    rows = [row(TNT, 1024, 4.0, 1.25), row(DYNAMIC, 1024, 3.2, 1.0), row(TNT, 2**20, 4.4, None)]
    lines = [line.split() for line in summarize_decode(rows).splitlines()[2:]]
    assert lines == [["1k", "1.25", "1.00"], ["1M", "1.10"]]
    assert summarize_decode(rows[1:2]) == "TNT was not measured"


def test_memory_is_read_where_linux_tells():
    if Path("/proc/self/status").exists():
        assert decode.resident_bytes("VmRSS", reset_peak=True) > 2**20
        assert decode.free_bytes(torch.device("cpu")) > 2**20
    assert decode.resident_bytes("VmNothing") is None
