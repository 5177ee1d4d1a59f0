"""The arguments of the benchmarks: what None stands for on which device, and the checks.

Those of `tnt bench decode` are in `decode_arguments`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from modeling_tnt.configuration import TNTConfig, available_presets
from modeling_tnt.kernels import BACKENDS

from ..common.costs import MODES
from ..common.models import make_titans_config, make_tnt_config
from ..common.output_folder import OutputFolder
from ..options import find_blocked_folder, flag_of, option

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PEERS = ("fla", "flash", "cudnn", "titans")
MEMORIES = ("mlp", "linear")
PROJECTIONS = ("shard", "chunk", "none")
MEMORY_BACKENDS = tuple(b for b in BACKENDS if b not in ("auto", "reference"))
MODEL_BACKENDS = tuple(b for b in BACKENDS if b != "reference")
PRECISIONS = ("autocast-bf16", "bf16", "fp32")
ATTENTIONS = ("flash", "cudnn")

_KERNEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "dtype": "bf16", "heads": 12, "shard_length": 2048, "tokens": 131072,
        "lengths": [2048, 4096, 8192, 16384, 32768, 65536], "chunk_sizes": [16, 8, 64, 128, 1],
    },
    "cpu": {
        "dtype": "fp32", "heads": 2, "shard_length": 256, "tokens": 1024,
        "lengths": [256, 512, 1024], "chunk_sizes": [16, 8],
    },
}  # fmt: skip
_KERNEL_QUICK: dict[str, dict[str, Any]] = {
    "cuda": {"lengths": [2048, 8192, 32768], "chunk_sizes": [16, 8], "case_seconds": 0.2},
    "cpu": {"lengths": [128, 256], "chunk_sizes": [16], "tokens": 256, "case_seconds": 0.05},
}
_MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "preset": "tnt-150m", "precision": "autocast-bf16", "tokens": 65536, "case_seconds": 2.0,
        "lengths": [2048, 4096, 8192, 16384, 32768], "chunk_sizes": [8, 16, 64],
    },
    "cpu": {"preset": "tiny", "precision": "fp32", "tokens": 512, "lengths": [128, 256, 512], "chunk_sizes": [8, 16]},
}  # fmt: skip
_MODEL_QUICK: dict[str, dict[str, Any]] = {
    "cuda": {"lengths": [2048, 8192, 32768], "case_seconds": 0.5},
    "cpu": {"lengths": [64, 128], "tokens": 128, "case_seconds": 0.05},
}


@dataclass
class BenchArguments:
    """What all benchmarks take. A None is filled in for the device by `resolve`. `results`: files in `output_dir`."""

    results: ClassVar[tuple[str, str]]

    device: str | None = option(None, "run", "cuda or cpu; by default cuda if there is one")
    quick: bool = option(False, "run", "fewer and smaller measurements, where their sizes are not given")
    case_seconds: float | None = option(None, "run", "seconds of repeats for each measurement; default 0.5 or more")
    time_limit: float | None = option(
        None, "run", "seconds after which no measurement is begun; what is left is written down as not run"
    )
    seed: int | None = option(None, "run", "of the random inputs; by default another one in each run, and printed")
    overwrite: bool = option(False, "output", "replace the results that output_dir holds")

    def _resolve(self, defaults: dict[str, dict[str, Any]], quick: dict[str, dict[str, Any]]) -> Any:
        """A copy without None but for `time_limit`. Raises one ValueError that lists every problem."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in defaults:
            raise ValueError(f"--device must be cuda or cpu, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or leave it out")
        fills = {"case_seconds": 0.5, "seed": secrets.randbits(31)}
        fills |= defaults[device] | (quick[device] if self.quick else {})
        fills = {k: v for k, v in fills.items() if getattr(self, k) is None}
        filled = replace(self, **fills | {"device": device, "output_dir": Path(self.output_dir)})
        problems = [*filled._find_problems(), *filled._find_wrong_sizes(), *find_blocked_folder(filled.output_dir)]
        problems += filled.output.find_problems(self.results, overwrite=self.overwrite)
        if problems:
            raise ValueError("\n  ".join(["these arguments cannot be used:", *problems]))
        return filled

    @property
    def output(self) -> OutputFolder:
        return OutputFolder(self.output_dir, f"bench {Path(self.results[0]).stem}")

    def _find_problems(self) -> Iterable[str]:
        """Those of one benchmark alone."""
        raise NotImplementedError

    def _find_wrong_sizes(self) -> Iterable[str]:
        for name in ("case_seconds", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                yield f"{flag_of(name)} must be positive and finite, got {value}"
        if self.seed < 0:
            yield f"--seed must be at least 0, got {self.seed}"

    def _find_too_small(self, *names: str) -> Iterable[str]:
        for name in names:
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number < 1:
                    yield f"{flag_of(name)} must be at least 1, got {number}"

    def _find_unknown(self, name: str, allowed: Iterable[str]) -> Iterable[str]:
        value, allowed = getattr(self, name), list(allowed)
        for item in value if isinstance(value, list) else [value]:
            if item not in allowed:
                yield f"{flag_of(name)} must be one of {', '.join(allowed)}, got {item!r}"


@dataclass
class _GridArguments(BenchArguments):
    """What the benchmarks of many tokens take, the grid with other defaults."""

    lengths: list[int] | None = None
    tokens: int | None = None
    chunk_sizes: list[int] | None = None

    def _find_wrong_sizes(self) -> Iterable[str]:
        yield from self._find_too_small("tokens", "lengths", "chunk_sizes")
        yield from super()._find_wrong_sizes()
        if self.tokens >= 1:
            for length in self.lengths:
                if length >= 1 and self.tokens % length:
                    yield f"--lengths must divide --tokens {self.tokens}, got {length}"


def _grid_option(name: str, help: str, defaults: dict[str, dict[str, Any]]) -> Any:
    """An option whose default depends on the device, both of which its help names."""
    on_gpu, on_cpu = (defaults[device][name] for device in ("cuda", "cpu"))
    words = [" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in (on_gpu, on_cpu)]
    return option(None, "grid", f"{help} (default: {words[0]}; on a CPU {words[1]})")


@dataclass
class KernelBenchArguments(_GridArguments):
    """What `tnt bench kernels` needs to know; every field is a flag."""

    results = ("kernels.csv", "kernels.png")

    lengths: list[int] | None = _grid_option("lengths", "tokens in a row (T)", _KERNEL_DEFAULTS)
    tokens: int | None = _grid_option("tokens", "tokens of a call, in tokens / T rows", _KERNEL_DEFAULTS)
    chunk_sizes: list[int] | None = _grid_option("chunk_sizes", "tokens in a chunk, in this order", _KERNEL_DEFAULTS)

    backends: list[str] = option(["triton", "torch"], "contenders", "of the memory operations, in this order")
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

    def resolve(self) -> KernelBenchArguments:
        return self._resolve(_KERNEL_DEFAULTS, _KERNEL_QUICK)

    def _find_problems(self) -> Iterable[str]:
        yield from self._find_unknown("backends", MEMORY_BACKENDS)
        yield from self._find_unknown("peers", [*PEERS, "none"])
        yield from self._find_unknown("memories", MEMORIES)
        yield from self._find_unknown("modes", MODES)
        yield from self._find_unknown("dtype", DTYPES)
        yield from self._find_unknown("qk_projection", PROJECTIONS)
        for name in ("heads", "head_dim", "expansion"):
            if getattr(self, name) < 1:
                yield f"{flag_of(name)} must be at least 1, got {getattr(self, name)}"
        if self.shard_length < 0:
            yield f"--shard-length must be at least 0, got {self.shard_length}"
        for chunk_size in self.chunk_sizes:
            if self.shard_length > 0 and chunk_size > 0 and self.shard_length % chunk_size:
                yield f"--shard-length {self.shard_length} must be a multiple of every chunk size, got {chunk_size}"


@dataclass
class ModelBenchArguments(_GridArguments):
    """What `tnt bench model` needs to know; every field is a flag."""

    results = ("model.csv", "model.png")

    lengths: list[int] | None = _grid_option("lengths", "tokens in a row (T)", _MODEL_DEFAULTS)
    tokens: int | None = _grid_option("tokens", "tokens of a step, in tokens / T rows", _MODEL_DEFAULTS)
    chunk_sizes: list[int] | None = _grid_option(
        "chunk_sizes", "of TNT's local memory, one model each, in this order", _MODEL_DEFAULTS
    )

    preset: str | None = option(None, "models", "of the TNT model; default tnt-150m, on a CPU tiny")
    backend: str = option("auto", "models", "of the memory operations: auto, torch or triton")
    titans_chunk_size: int = option(8, "models", "tokens in a chunk of the Titans model; 0: no Titans model")
    attention: str = option("flash", "models", "the Llama's, through torch's SDPA: flash (FlashAttention) or cudnn")
    compile_llama: bool = option(False, "models", "run the Llama through torch.compile")
    precision: str | None = option(
        None, "models", "autocast-bf16 (float32 weights, default on a GPU), bf16 (weights, too) or fp32 (default on a "
        "CPU)",
    )  # fmt: skip
    output_dir: Path = option(Path("runs/bench-model"), "output", "folder for model.csv and model.png")

    def resolve(self) -> ModelBenchArguments:
        return self._resolve(_MODEL_DEFAULTS, _MODEL_QUICK)

    def tnt_config(self, chunk_size: int) -> TNTConfig:
        return make_tnt_config(self.preset, chunk_size, self.backend)

    def titans_config(self) -> TNTConfig:
        return make_titans_config(self.preset, self.titans_chunk_size, self.backend)

    def _find_problems(self) -> Iterable[str]:
        unknown = [*self._find_unknown("preset", available_presets()), *self._find_unknown("backend", MODEL_BACKENDS)]
        yield from unknown
        yield from [] if unknown else self._find_wrong_configs()
        yield from self._find_unknown("attention", ATTENTIONS)
        yield from self._find_unknown("precision", PRECISIONS)
        if self.titans_chunk_size < 0:
            yield f"--titans-chunk-size must be at least 0, got {self.titans_chunk_size}"

    def _find_wrong_configs(self) -> Iterable[str]:
        for chunk_size in self.chunk_sizes:
            try:
                self.tnt_config(chunk_size)
            except ValueError as error:
                yield f"--chunk-sizes {chunk_size}: {error}"
        if self.titans_chunk_size > 0:
            try:
                self.titans_config()
            except ValueError as error:
                yield f"--titans-chunk-size {self.titans_chunk_size}: {error}; 0 leaves the Titans model out"
