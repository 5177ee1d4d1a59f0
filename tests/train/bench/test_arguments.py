"""The arguments of the benchmarks: defaults, checks, and results that are in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_tnt.train.bench import arguments
from modeling_tnt.train.bench.arguments import (
    ContextParallelBenchArguments,
    KernelBenchArguments,
    ModelBenchArguments,
)
from modeling_tnt.train.cli import main


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("kernels", ["--lengths", "48"], "--lengths must divide --tokens 64, got 48"),
        ("kernels", ["--lengths", "0"], "--lengths must be at least 1, got 0"),
        ("kernels", ["--chunk-sizes", "24"], "--shard-length 32 must be a multiple of every chunk size, got 24"),
        ("kernels", ["--backends", "torsh"], "--backends must be one of torch, native, triton, got 'torsh'"),
        ("kernels", ["--peers", "vllm"], "--peers must be one of fla, flash, cudnn, titans, none, got 'vllm'"),
        ("kernels", ["--modes", "backward"], "--modes must be one of forward+backward, forward, got 'backward'"),
        ("kernels", ["--dtype", "int8"], "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
        ("kernels", ["--heads", "0"], "--heads must be at least 1, got 0"),
        ("kernels", ["--time-limit", "-1"], "--time-limit must be positive and finite, got -1.0"),
        ("kernels", ["--seed", "-1"], "--seed must be at least 0, got -1"),
        ("kernels", ["--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        ("model", ["--preset", "huge"], "--preset must be one of tiny, "),
        ("model", ["--precision", "fp8"], "--precision must be one of autocast-bf16, bf16, fp32, got 'fp8'"),
        ("model", ["--attention", "eager"], "--attention must be one of flash, cudnn, got 'eager'"),
        ("model", ["--chunk-sizes", "24"], "--chunk-sizes 24: TNTConfig has 1 problem"),
        ("model", ["--titans-chunk-size", "-8"], "--titans-chunk-size must be at least 0, got -8"),
        ("model", ["--preset", "ttt-mlp-125m"], "0 leaves the Titans model out"),
        ("decode", ["--contexts", "0"], "--contexts must be at least 1, got 0"),
        ("decode", ["--read", "0"], "--read must be at least 1, got 0"),
        ("decode", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ("decode", ["--preset", "huge"], "--preset must be one of tiny, "),
        ("decode", ["--peer", "mamba"], "--peer must be one of llama, none, got 'mamba'"),
        ("decode", ["--dtype", "int8"], "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
        ("decode", ["--memory-limit", "-1"], "--memory-limit must be at least 0 and finite, got -1.0"),
        ("decode", ["--backends", "torc"], "--backends must be one of auto, torch, native, triton, got 'torc'"),
        ("context-parallel", ["--ranks", "0"], "--ranks must be at least 1, got 0"),
        ("context-parallel", ["--seq-lens", "0"], "--seq-lens must be at least 1, got 0"),
        ("context-parallel", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ("context-parallel", ["--threads", "0"], "--threads must be at least 1, got 0"),
        ("context-parallel", ["--precision", "fp8"], "--precision must be one of autocast-bf16, bf16, fp32, got 'fp8'"),
        ("context-parallel", ["--rank-timeout", "0"], "--rank-timeout must be positive and finite, got 0.0"),
        ("context-parallel", ["--link-gigabytes", "nan"], "--link-gigabytes must be positive and finite, got nan"),
        ("context-parallel", ["--predict", "--preset", "tiny"], "--preset must be one of tnt-150m, titans-150m with"),
        (
            "context-parallel",
            ["--predict"],
            "--seq-lens must be multiples of 2048, the shortest part predicted",
        ),
        ("context-parallel", ["--predict", "--batch-size", "2"], "--batch-size must be 1 with --predict"),
        ("model", ["--backends", "torch", "torch"], "--backends must name each backend once, got torch torch"),
    ],
)
def test_bad_arguments(bench, name: str, flags: list[str], message: str, output_dir: Path, capsys):
    assert bench(name, *flags) == 2
    printed = capsys.readouterr().err
    assert f"tnt bench {name}: error: " in printed and message in printed
    assert not output_dir.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(bench, capsys):
    assert bench("kernels", "--device", "cuda") == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_more_ranks_than_gpus(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert bench("context-parallel", "--device", "cuda", "--ranks", "4") == 2
    assert "--ranks must be at most 3, the GPUs there are, got 4; or use --device cpu" in capsys.readouterr().err
    assert ContextParallelBenchArguments(seed=0).resolve().ranks == [1, 2]
    assert bench("context-parallel", "--device", "cuda", "--predict") == 2
    assert "--predict needs no device, got --device cuda; leave one of them out" in capsys.readouterr().err


def test_a_gpu_without_triton(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert bench("model", "--device", "cuda") == 2
    assert "--device cuda needs triton" in capsys.readouterr().err


def test_results_are_not_replaced_unasked(bench, tmp_path: Path, capsys):
    assert bench("kernels", "--time-limit", "1e-9") == 0
    assert bench("kernels") == 2
    assert "holds kernels.csv, kernels.png; give another folder, or --overwrite" in capsys.readouterr().err
    assert bench("kernels", "--time-limit", "1e-9", "--overwrite") == 0
    (tmp_path / "file").touch()
    assert bench("kernels", "--output-dir", str(tmp_path / "file" / "below")) == 2
    assert "is a file; give another folder" in capsys.readouterr().err


def test_an_unknown_flag_is_answered_with_the_nearest(bench, capsys):
    for name in ("kernels", "model"):
        with pytest.raises(SystemExit, match="2"):
            bench(name, "--lenghts", "32")
        assert "--lenghts is unknown; did you mean --lengths?" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark_name", ["kernels", "model"])
def test_help_names_defaults(benchmark_name: str, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", benchmark_name, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "(default: 2048 4096 8192 16384 32768" in words and "on a CPU" in words


def test_defaults_on_a_gpu_are_the_documented_ones(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    args = KernelBenchArguments(output_dir=tmp_path).resolve()
    assert (args.device, args.dtype, args.head_dim, args.heads, args.expansion) == ("cuda", "bf16", 64, 12, 2)
    assert args.shard_length == 2048 and args.lengths == [2**n for n in range(11, 17)]
    assert args.chunk_sizes[0] == 16 and sorted(args.chunk_sizes) == [1, 8, 16, 64, 128]
    quick = KernelBenchArguments(quick=True, chunk_sizes=[4], output_dir=tmp_path).resolve()
    assert quick.lengths == [2048, 8192, 32768] and quick.chunk_sizes == [4] and quick.tokens == args.tokens
    args = ContextParallelBenchArguments(predict=True, output_dir=tmp_path).resolve()
    assert (args.device, args.preset, args.ranks) == ("cpu", "tnt-150m", [])
    assert args.seq_lens == [2**14, 2**17, 2**20]
    args = ModelBenchArguments(output_dir=tmp_path).resolve()
    assert (args.preset, args.chunk_sizes, args.titans_chunk_size) == ("tnt-150m", [8, 16, 64], 8)
    assert args.lengths == [2**n for n in range(11, 16)] and args.precision == "autocast-bf16"
