"""The arguments of the benchmarks: what None stands for on which device, and the checks."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from modeling_tnt.configuration import TNTConfig, available_presets
from modeling_tnt.kernels import BACKENDS

from ..common.costs import MODES
from ..common.machine import count_cpus
from ..common.output_folder import OutputFolder
from ..options import find_blocked_folder, flag_of, option
from .predicted_parts import load_parts, predicted_presets

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PEERS = ("fla", "flash", "cudnn", "titans")
MEMORIES = ("mlp", "linear")
PROJECTIONS = ("shard", "chunk", "none")
MEMORY_BACKENDS = tuple(b for b in BACKENDS if b not in ("auto", "reference"))
MODEL_BACKENDS = tuple(b for b in BACKENDS if b != "reference")
WEIGHT_DTYPES = {"autocast-bf16": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}  # of a precision
PRECISIONS = tuple(WEIGHT_DTYPES)
ATTENTIONS = ("flash", "cudnn")
DECODE_PEERS = ("llama", "none")
CONTEXTS = [1024, 2048, 16384, 32768, 1048576]
RANKS = [1, 2, 4]
PREDICTED_PRESET, PREDICTED_SEQ_LENS = "tnt-150m", [16384, 131072, 1048576]

ByDevice = dict[str, dict[str, Any]]

_KERNEL_DEFAULTS: ByDevice = {
    "cuda": {
        "dtype": "bf16", "heads": 12, "shard_length": 2048, "tokens": 131072,
        "lengths": [2048, 4096, 8192, 16384, 32768, 65536], "chunk_sizes": [16, 8, 64, 128, 1],
        "backends": ["triton", "torch"],
    },
    "cpu": {
        "dtype": "fp32", "heads": 2, "shard_length": 256, "tokens": 1024,
        "lengths": [256, 512, 1024], "chunk_sizes": [16, 8], "backends": ["native", "torch"],
    },
}  # fmt: skip
_MODEL_DEFAULTS: ByDevice = {
    "cuda": {
        "preset": "tnt-150m", "precision": "autocast-bf16", "tokens": 65536, "case_seconds": 2.0,
        "lengths": [2048, 4096, 8192, 16384, 32768], "chunk_sizes": [8, 16, 64],
    },
    "cpu": {"preset": "tiny", "precision": "fp32", "tokens": 512, "lengths": [128, 256, 512], "chunk_sizes": [8, 16]},
}  # fmt: skip


def in_precision(precision: str, device: str) -> AbstractContextManager:
    """In which a model's forward pass runs."""
    return torch.autocast(device, torch.bfloat16) if precision == "autocast-bf16" else nullcontext()


@dataclass
class BenchArguments:
    """What all benchmarks take. A None is filled in by `resolve`."""

    results: ClassVar[tuple[str, str]]  # files in output_dir
    defaults: ClassVar[ByDevice]  # of fields that are None
    quick_defaults: ClassVar[ByDevice]  # the same with --quick
    choices: ClassVar[dict[str, Iterable[str]]]  # of a field, or of each item of its list
    least: ClassVar[dict[str, int]] = {"seed": 0}  # the smallest number that a field, or its list, may hold

    backends: ClassVar[list[str]]  # a field of each benchmark, with choices of its own

    device: str | None = option(None, "run", "cuda or cpu; by default cuda if there is one")
    quick: bool = option(False, "run", "fewer and smaller measurements, where their sizes are not given")
    case_seconds: float | None = option(None, "run", "seconds of repeats for each measurement; default 0.5 or more")
    time_limit: float | None = option(
        None, "run", "seconds after which no measurement is begun; what is left is written down as not run"
    )
    seed: int | None = option(None, "run", "of the random inputs; by default another one in each run, and printed")
    overwrite: bool = option(False, "output", "replace the results that output_dir holds")

    @property
    def command(self) -> str:
        return f"bench {Path(self.results[0]).stem}"

    @property
    def output(self) -> OutputFolder:
        return OutputFolder(self.output_dir, self.command)

    def resolve(self) -> Any:
        """A copy without None but for limits. Raises one ValueError that lists every problem."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in self.defaults:
            raise ValueError(f"--device must be cuda or cpu, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or leave it out")
        fills = {"case_seconds": 0.5, "seed": secrets.randbits(31)} | self.defaults[device]
        fills |= self.quick_defaults[device] if self.quick else {}
        fills = {name: value for name, value in fills.items() if getattr(self, name) is None}
        filled = replace(self, **fills | {"device": device, "output_dir": Path(self.output_dir)})
        problems = [*filled._find_problems(), *find_blocked_folder(filled.output_dir)]
        problems += filled.output.find_problems(self.results, overwrite=self.overwrite)
        if problems:
            raise ValueError("\n  ".join(["these arguments cannot be used:", *problems]))
        return filled

    def _find_problems(self) -> Iterable[str]:
        for name, allowed in self.choices.items():
            for item in _as_list(getattr(self, name)):
                if item not in allowed:
                    yield f"{flag_of(name)} must be one of {', '.join(allowed)}, got {item!r}"
        if len(set(self.backends or ())) < len(self.backends or ()):
            yield f"--backends must name each backend once, got {' '.join(self.backends)}"
        for name, least in self.least.items():
            for number in _as_list(getattr(self, name)):
                if number < least:
                    yield f"{flag_of(name)} must be at least {least}, got {number}"
        for name in ("case_seconds", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                yield f"{flag_of(name)} must be positive and finite, got {value}"


@dataclass
class _GridArguments(BenchArguments):
    """What the benchmarks of many tokens take, the grid with other defaults."""

    least = BenchArguments.least | {"tokens": 1, "lengths": 1, "chunk_sizes": 1}

    lengths: list[int] | None = None
    tokens: int | None = None
    chunk_sizes: list[int] | None = None

    def _find_problems(self) -> Iterable[str]:
        yield from super()._find_problems()
        if self.device == "cuda" and find_spec("triton") is None:
            yield "--device cuda needs triton, which times calls on a GPU; pip install triton, or use --device cpu"
        for length in self.lengths:
            if self.tokens >= 1 and length >= 1 and self.tokens % length:
                yield f"--lengths must divide --tokens {self.tokens}, got {length}"


def _grid_option(name: str, help: str, defaults: ByDevice) -> Any:
    """An option whose default depends on the device, both of which its help names."""
    on_gpu, on_cpu = (defaults[device][name] for device in ("cuda", "cpu"))
    words = [" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in (on_gpu, on_cpu)]
    return option(None, "grid", f"{help} (default: {words[0]}; on a CPU {words[1]})")


@dataclass
class KernelBenchArguments(_GridArguments):
    """What `tnt bench kernels` needs to know; every field is a flag."""

    results = ("kernels.csv", "kernels.png")
    defaults = _KERNEL_DEFAULTS
    quick_defaults: ClassVar[ByDevice] = {
        "cuda": {"lengths": [2048, 8192, 32768], "chunk_sizes": [16, 8], "case_seconds": 0.2},
        "cpu": {"lengths": [128, 256], "chunk_sizes": [16], "tokens": 256, "case_seconds": 0.05},
    }
    choices: ClassVar[dict[str, Iterable[str]]] = {
        "backends": MEMORY_BACKENDS, "peers": (*PEERS, "none"), "memories": MEMORIES, "modes": MODES, "dtype": DTYPES,
        "qk_projection": PROJECTIONS,
    }  # fmt: skip
    least = _GridArguments.least | {"heads": 1, "head_dim": 1, "expansion": 1, "shard_length": 0}

    lengths: list[int] | None = _grid_option("lengths", "tokens in a row (T)", _KERNEL_DEFAULTS)
    tokens: int | None = _grid_option("tokens", "tokens of a call, in tokens / T rows", _KERNEL_DEFAULTS)
    chunk_sizes: list[int] | None = _grid_option("chunk_sizes", "tokens in a chunk, in this order", _KERNEL_DEFAULTS)

    backends: list[str] | None = option(
        None, "contenders", "of the memory operations, timed in turns in this order: torch, native or triton; default "
        "triton torch, on a CPU native torch",
    )  # fmt: skip
    peers: list[str] = option(
        list(PEERS), "contenders", "fla: chunk_ttt_linear of flash-linear-attention; flash, cudnn: causal attention "
        "through torch's SDPA; titans: NeuralMemory of titans-pytorch; none: no peer",
    )  # fmt: skip
    memories: list[str] = option(list(MEMORIES), "contenders", "mlp, linear or both")
    modes: list[str] = option(list(MODES), "contenders", "forward+backward, forward (without gradients) or both")
    dtype: str | None = option(None, "shape", "of q, k and v: bf16 (default on a GPU), fp16 or fp32 (default on a CPU)")
    heads: int | None = option(None, "shape", "heads (H); default 12, on a CPU 2")
    head_dim: int = option(64, "shape", "entries of a head (D)")
    expansion: int = option(2, "shape", "hidden width of an MLP memory in units of head_dim")
    shard_length: int | None = option(
        None, "shape", "tokens after which a memory is reset; 0: never; default 2048, on a CPU 256"
    )
    qk_projection: str = option(
        "shard", "shape", "at which query an MLP memory is read: shard, chunk or none; a linear one, as FLA's, at none"
    )
    output_dir: Path = option(Path("runs/bench-kernels"), "output", "folder for kernels.csv and kernels.png")

    def _find_problems(self) -> Iterable[str]:
        yield from super()._find_problems()
        for chunk_size in self.chunk_sizes:
            if self.shard_length > 0 and chunk_size > 0 and self.shard_length % chunk_size:
                yield f"--shard-length {self.shard_length} must be a multiple of every chunk size, got {chunk_size}"


@dataclass
class ModelBenchArguments(_GridArguments):
    """What `tnt bench model` needs to know; every field is a flag."""

    results = ("model.csv", "model.png")
    defaults = _MODEL_DEFAULTS
    quick_defaults: ClassVar[ByDevice] = {
        "cuda": {"lengths": [2048, 8192, 32768], "case_seconds": 0.5},
        "cpu": {"lengths": [64, 128], "tokens": 128, "case_seconds": 0.05},
    }
    choices: ClassVar[dict[str, Iterable[str]]] = {
        "preset": available_presets(), "backends": MODEL_BACKENDS, "attention": ATTENTIONS, "precision": PRECISIONS,
    }  # fmt: skip
    least = _GridArguments.least | {"titans_chunk_size": 0}

    lengths: list[int] | None = _grid_option("lengths", "tokens in a row (T)", _MODEL_DEFAULTS)
    tokens: int | None = _grid_option("tokens", "tokens of a step, in tokens / T rows", _MODEL_DEFAULTS)
    chunk_sizes: list[int] | None = _grid_option(
        "chunk_sizes", "of TNT's local memory, one model each, in this order", _MODEL_DEFAULTS
    )

    preset: str | None = option(None, "models", "of the TNT model; default tnt-150m, on a CPU tiny")
    backends: list[str] = option(["auto"], "models", f"of the memory operations, in turns: {', '.join(MODEL_BACKENDS)}")
    titans_chunk_size: int = option(8, "models", "tokens in a chunk of the Titans model; 0: no Titans model")
    attention: str = option("flash", "models", "the Llama's, through torch's SDPA: flash (FlashAttention) or cudnn")
    compile_llama: bool = option(False, "models", "run the Llama through torch.compile")
    precision: str | None = option(
        None, "models", "autocast-bf16 (float32 weights, default on a GPU), bf16 (weights, too) or fp32 (default on a "
        "CPU)",
    )  # fmt: skip
    output_dir: Path = option(Path("runs/bench-model"), "output", "folder for model.csv and model.png")

    def tnt_config(self, chunk_size: int, backend: str) -> TNTConfig:
        """The preset with one local memory of this chunk size. Raises ValueError if the two do not fit."""
        return TNTConfig.from_preset(self.preset, local_chunk_sizes=[chunk_size], kernel_backend=backend)

    def titans_config(self, backend: str) -> TNTConfig:
        """The preset as a Titans model: `titans-150m` is `tnt-150m` with these changes. Raises ValueError as above."""
        return TNTConfig.from_preset(
            self.preset, global_chunk_size=None, local_chunk_sizes=[self.titans_chunk_size], local_shard_lengths=None,
            qk_projection="none", use_momentum=True, use_forget_gate=True, kernel_backend=backend,
        )  # fmt: skip

    def _find_problems(self) -> Iterable[str]:
        yield from super()._find_problems()
        if self.preset in self.choices["preset"]:
            yield from self._find_wrong_configs()

    def _find_wrong_configs(self) -> Iterable[str]:
        for chunk_size in self.chunk_sizes:
            try:
                self.tnt_config(chunk_size, "auto")
            except ValueError as error:
                yield f"--chunk-sizes {chunk_size}: {error}"
        if self.titans_chunk_size > 0:
            try:
                self.titans_config("auto")
            except ValueError as error:
                yield f"--titans-chunk-size {self.titans_chunk_size}: {error}; 0 leaves the Titans model out"


@dataclass
class DecodeBenchArguments(BenchArguments):
    """What `tnt bench decode` needs to know; every field is a flag."""

    results = ("decode.json", "decode.png")
    defaults: ClassVar[ByDevice] = {
        "cuda": {"preset": "tnt-150m", "dtype": "bf16", "contexts": CONTEXTS, "case_seconds": 2.0},
        "cpu": {"preset": "tiny", "dtype": "fp32", "contexts": CONTEXTS, "case_seconds": 2.0},
    }
    quick_defaults = dict.fromkeys(defaults, {"contexts": [1024, 16384], "case_seconds": 0.5})
    choices: ClassVar[dict[str, Iterable[str]]] = {
        "preset": available_presets(), "backends": MODEL_BACKENDS, "peer": DECODE_PEERS, "dtype": DTYPES,
    }  # fmt: skip
    least = BenchArguments.least | {"contexts": 1, "batch_size": 1, "read": 1}

    contexts: list[int] | None = option(
        None, "grid", f"tokens read before the step (default: {' '.join(map(str, CONTEXTS))})"
    )
    batch_size: int = option(1, "grid", "rows, one new token each")
    preset: str | None = option(None, "models", "of the TNT model; default tnt-150m, on a CPU tiny")
    backends: list[str] = option(
        ["auto"], "models", f"of TNT's memory operations, in turns: {', '.join(MODEL_BACKENDS)}"
    )
    peer: str = option(
        "llama", "models", "llama: transformers' Llama of as many parameters, with a DynamicCache and with a "
        "StaticCache; TNT is compared with the faster one; or none",
    )  # fmt: skip
    dtype: str | None = option(
        None, "models", "of the weights: bf16 (default on a GPU), fp16 or fp32 (default on a CPU)"
    )
    read: int = option(1024, "models", "tokens that TNT's memories read before they are told the position")
    memory_limit: float | None = option(
        None, "run", "GiB that the KV caches of one context may take; default 0.6 of what is free"
    )
    output_dir: Path = option(Path("runs/bench-decode"), "output", "folder for decode.json and decode.png")

    def tnt_config(self, backend: str) -> TNTConfig:
        return TNTConfig.from_preset(self.preset, kernel_backend=backend)

    def _find_problems(self) -> Iterable[str]:
        yield from super()._find_problems()
        if self.memory_limit is not None and not 0 <= self.memory_limit < float("inf"):
            yield f"--memory-limit must be at least 0 and finite, got {self.memory_limit}"


@dataclass
class ContextParallelBenchArguments(BenchArguments):
    """What `tnt bench context-parallel` needs to know; every field is a flag."""

    results = ("context-parallel.json", "context-parallel.png")
    defaults: ClassVar[ByDevice] = {
        "cuda": {
            "preset": "tnt-150m", "precision": "autocast-bf16", "seq_lens": [16384, 65536], "case_seconds": 2.0,
        },
        "cpu": {
            "preset": "tiny", "precision": "fp32", "seq_lens": [2048, 8192, 32768], "case_seconds": 4.0, "ranks": RANKS,
        },
    }  # fmt: skip
    quick_defaults: ClassVar[ByDevice] = {
        "cuda": {"seq_lens": [16384], "case_seconds": 0.5},
        "cpu": {"seq_lens": [2048, 8192], "ranks": [1, 2], "case_seconds": 1.0},
    }
    choices: ClassVar[dict[str, Iterable[str]]] = {
        "preset": available_presets(), "backends": MODEL_BACKENDS, "precision": PRECISIONS,
    }  # fmt: skip
    least = BenchArguments.least | {"ranks": 1, "seq_lens": 1, "batch_size": 1}

    ranks: list[int] | None = option(
        None, "grid", "processes that share a sequence; 1 is there in any case, as the others are compared with it "
        "(default: 1 2 4; on GPUs powers of two up to their number; with --predict up to a part of 2048 tokens each)",
    )  # fmt: skip
    seq_lens: list[int] | None = option(
        None, "grid", "tokens in a row (default: 2048 8192 32768; on GPUs 16384 65536; with --predict 16384 131072 "
        "1048576)",
    )  # fmt: skip
    batch_size: int = option(1, "grid", "rows of a step")
    preset: str | None = option(None, "models", "of the TNT model; default tiny, on a GPU and with --predict tnt-150m")
    backends: list[str] = option(
        ["auto"], "models", f"of the memory operations, one after the other: {', '.join(MODEL_BACKENDS)}"
    )
    precision: str | None = option(
        None, "models", "autocast-bf16 (float32 weights, default on a GPU), bf16 (weights, too) or fp32 (default on a "
        "CPU)",
    )  # fmt: skip
    threads: int | None = option(
        None, "run", "of each process on a CPU, one rank's, too; default the CPUs there are, shared by the most ranks"
    )
    rank_timeout: float = option(
        300.0, "run", "seconds after which a process that waits for another one, or is waited for, ends the benchmark"
    )
    predict: bool = option(
        False, "prediction", "measure nothing: predict for GPUs, from the predicted times of kernels, how far more "
        "ranks make a step faster",
    )  # fmt: skip
    link_microseconds: float = option(20.0, "prediction", "that a message between two GPUs takes at the least")
    link_gigabytes: float = option(50.0, "prediction", "a second between two GPUs; 50 are those of 400 Gb/s InfiniBand")
    output_dir: Path = option(
        Path("runs/bench-context-parallel"), "output", "folder for context-parallel.json and context-parallel.png"
    )

    def resolve(self) -> ContextParallelBenchArguments:
        chosen = self
        if self.predict:
            fills = {"device": "cpu", "preset": PREDICTED_PRESET, "seq_lens": PREDICTED_SEQ_LENS, "ranks": []}
            chosen = replace(self, **{name: value for name, value in fills.items() if getattr(self, name) is None})
        elif self.ranks is None and self.device != "cpu":
            gpus = torch.cuda.device_count()
            chosen = replace(self, ranks=[2**i for i in range(gpus.bit_length())] or None)
        filled = BenchArguments.resolve(chosen)
        ranks = sorted({1, *filled.ranks}) if filled.ranks else []
        threads = filled.threads or max(1, count_cpus() // max([1, *ranks]))
        return replace(filled, ranks=ranks, threads=threads, seq_lens=sorted(set(filled.seq_lens)))

    def tnt_config(self, backend: str) -> TNTConfig:
        return TNTConfig.from_preset(self.preset, kernel_backend=backend)

    def _find_problems(self) -> Iterable[str]:
        yield from super()._find_problems()
        if self.threads is not None and self.threads < 1:
            yield f"--threads must be at least 1, got {self.threads}"
        for name in ("rank_timeout", "link_microseconds", "link_gigabytes"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                yield f"{flag_of(name)} must be positive and finite, got {value}"
        if self.predict:
            yield from self._find_wrong_predictions()
        elif self.device == "cuda" and max(self.ranks) > (gpus := torch.cuda.device_count()):
            yield f"--ranks must be at most {gpus}, the GPUs there are, got {max(self.ranks)}; or use --device cpu"

    def _find_wrong_predictions(self) -> Iterable[str]:
        if self.device == "cuda":
            yield "--predict needs no device, got --device cuda; leave one of them out"
        if self.batch_size != 1:
            yield f"--batch-size must be 1 with --predict, whose times are those of one row, got {self.batch_size}"
        known = predicted_presets()
        if self.preset not in known:
            yield f"--preset must be one of {', '.join(known)} with --predict, got {self.preset!r}"
            return
        shortest = load_parts(self.preset).middle.lengths[0]
        for length in self.seq_lens:
            if length < shortest or length % shortest:
                yield f"--seq-lens must be multiples of {shortest}, the shortest part predicted, got {length}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
