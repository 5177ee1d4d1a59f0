"""`tnt bench model` at sizes that take no time: what it measures, writes and prints, and the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.kernels import choose_backend
from modeling_tnt.train.bench import model
from modeling_tnt.train.bench.arguments import ModelBenchArguments
from modeling_tnt.train.bench.model import find_crossover, summarize_crossovers
from modeling_tnt.train.bench.rows import ModelRow
from modeling_tnt.train.common.models import build_llama, make_llama_config


def test_model_measures_writes_and_prints(run, output_dir: Path, capsys):
    status, rows = run("model")
    assert status == 0
    assert [row["contender"] for row in rows] == ["llama"] * 2 + ["tnt C=16"] * 2 + ["titans C=8"] * 2
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert float(row["tokens_per_second"]) == pytest.approx(64e3 / float(row["ms_median"]))
        assert 0 < float(row["loss"]) < 7  # random bytes: ln 384 = 5.95 before steps, as many as the machine manages
    sizes = [int(row["parameters"]) for row in rows[::2]]
    assert max(sizes) < 1.1 * min(sizes)
    assert (output_dir / "model.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "tnt C=16 " in printed[printed.index("faster than the Llama from a length of") :]
    assert f"{sizes[0]:,}" in printed


def test_model_time_limit_and_failure(run, monkeypatch, capsys):
    status, rows = run("model", "--time-limit", "1e-9", "--titans-chunk-size", "0")
    assert status == 0 and [row["status"] for row in rows] == ["not run"] * 4
    assert "not measured: no length at which both were timed" in capsys.readouterr().out

    def diverge(self, *args, **options):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(model.ModelBench, "_prepare", diverge)
    status, rows = run("model", "--overwrite")
    assert status == 0 and {row["reason"] for row in rows} == {"FloatingPointError: the loss is nan"}
    assert "llama T=32 and 1 more: failed" in capsys.readouterr().out


def test_backends_are_rows_of_their_own(run, capsys):
    _, rows = run("model", "--backends", "torch", "auto", "--lengths", "32", "--titans-chunk-size", "0")
    assert [(row["contender"], row["backend"]) for row in rows] == [
        ("llama", ""), ("tnt torch C=16", "torch"), ("tnt auto C=16", choose_backend("cpu").name),
    ]  # fmt: skip
    assert {row["status"] for row in rows} == {"ok"} and {row["parameters"] for row in rows[1:]} == {"848120"}
    assert "tnt auto C=16 " in capsys.readouterr().out


def test_a_hybrid_is_trained_with_any_kernel_of_attention(run, output_dir: Path):
    """FlashAttention takes no masks; the Llama, which has none, keeps to it."""
    args = ["--preset", "tiny-mac", "--titans-chunk-size", "0", "--lengths", "32"]
    _, rows = run("model", *args)
    assert [(row["contender"], row["status"]) for row in rows] == [("llama", "ok"), ("tnt C=16", "ok")]
    arguments = ModelBenchArguments(
        device="cpu", preset="tiny-mac", titans_chunk_size=0, output_dir=output_dir / "other"
    )
    bench = model.ModelBench(arguments.resolve())
    for candidate in (one for several in bench.candidates() for one in several):
        with bench._attention(candidate):
            assert torch.backends.cuda.math_sdp_enabled() == (candidate.name != "llama")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast-bf16", "bf16"])
def test_model_precisions(run, precision: str):
    _, rows = run("model", "--precision", precision, "--lengths", "32", "--titans-chunk-size", "0")
    assert [row["status"] for row in rows] == ["ok", "ok"], [row["reason"] for row in rows]


@pytest.mark.parametrize("preset", ["tnt-150m", "tiny"])
def test_the_llama_has_as_many_parameters(preset: str):
    config = TNTConfig.from_preset(preset)
    llama = make_llama_config(config, 1024)
    with torch.device("meta"):
        ours, other = TNTForCausalLM(config).num_parameters(), build_llama(config, 1024).num_parameters()
    assert abs(other / ours - 1) < 0.02
    assert (llama.hidden_size, llama.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)
    assert (llama.num_attention_heads, llama.vocab_size) == (config.num_heads, config.vocab_size)


def test_the_titans_model_is_the_preset():
    made, preset = ModelBenchArguments(preset="tnt-150m").titans_config("auto"), TNTConfig.from_preset("titans-150m")
    assert made.to_diff_dict() == preset.to_diff_dict()


def test_the_llama_attends_causally_without_a_mask(monkeypatch):
    """With a mask torch would refuse FlashAttention on a GPU."""
    calls, attention = [], F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **options):
        calls.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    llama = build_llama(TNTConfig.from_preset("tiny"), 32)
    llama(input_ids=torch.zeros(2, 32, dtype=torch.long))
    assert calls == [(None, True)] * 3


def test_crossover():
    llama = {2048: 8.0, 4096: 4.0, 8192: 2.0}
    assert find_crossover({2048: 1.0, 4096: 1.0, 8192: 1.0}, llama) is None
    assert find_crossover({2048: 9.0, 4096: 9.0, 8192: 9.0}, llama) == "always"
    assert find_crossover({2048: 4.0, 4096: 4.0, 8192: 4.0}, llama) == pytest.approx(4096)
    # The Llama's speed is proportional to 1 / length: equal where it is 2.83.
    assert find_crossover({4096: 8**0.5, 8192: 8**0.5}, llama) == pytest.approx(4096 * 2**0.5)
    # Faster, slower, faster: the last change counts.
    assert 4096 < find_crossover({2048: 9.0, 4096: 3.0, 8192: 3.0}, llama) < 8192
    assert find_crossover({}, llama) is None


def test_crossovers_as_text():
    speeds = {"llama": (8.0, 4.0, 2.0), "tnt C=8": (1.0, 1.0, 1.0), "tnt C=16": (4.0, 4.0, 8.0), "tnt C=64": (9.0,) * 3}
    rows = [
        ModelRow(name, T, 1, "ok", tokens_per_second=speed)
        for name, values in speeds.items()
        for T, speed in zip((2048, 4096, 8192), values, strict=True)
    ]
    rows.append(ModelRow("titans C=8", 2048, 1, "out of memory"))
    assert [" ".join(line.split()) for line in summarize_crossovers(rows).splitlines()] == [
        "faster than the Llama from a length of",
        "tnt C=8 none up to 8k (0.50 times the Llama's tokens/s at 8k)",
        "tnt C=16 4,096 tokens, interpolated (4.00 times the Llama's tokens/s at 8k)",
        "tnt C=64 2k or less, the shortest that was timed (4.50 times the Llama's tokens/s at 8k)",
        "titans C=8 not measured: no length at which both were timed",
    ]
