"""The arguments of `tnt bench decode`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_tnt.configuration import TNTConfig, available_presets

from ..options import option
from .arguments import DTYPES, MODEL_BACKENDS, BenchArguments

CONTEXTS = [1024, 2048, 16384, 32768, 1048576]
DECODE_PEERS = ("llama", "none")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"preset": "tnt-150m", "dtype": "bf16", "contexts": CONTEXTS, "case_seconds": 2.0},
    "cpu": {"preset": "tiny", "dtype": "fp32", "contexts": CONTEXTS, "case_seconds": 2.0},
}
_QUICK: dict[str, dict[str, Any]] = {
    device: {"contexts": [1024, 16384], "case_seconds": 0.5} for device in ("cuda", "cpu")
}


@dataclass
class DecodeBenchArguments(BenchArguments):
    """What `tnt bench decode` needs to know; every field is a flag."""

    results = ("decode.json", "decode.png")

    contexts: list[int] | None = option(
        None, "grid", f"tokens read before the step (default: {' '.join(map(str, CONTEXTS))})"
    )
    batch_size: int = option(1, "grid", "rows, one new token each")
    preset: str | None = option(None, "models", "of the TNT model; default tnt-150m, on a CPU tiny")
    backend: str = option("auto", "models", "of TNT's memory operations: auto, torch or triton")
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

    def resolve(self) -> DecodeBenchArguments:
        return self._resolve(_DEFAULTS, _QUICK)

    def tnt_config(self) -> TNTConfig:
        return TNTConfig.from_preset(self.preset, kernel_backend=self.backend)

    def _find_problems(self) -> Iterable[str]:
        yield from self._find_too_small("contexts", "batch_size", "read")
        yield from self._find_unknown("preset", available_presets())
        yield from self._find_unknown("backend", MODEL_BACKENDS)
        yield from self._find_unknown("peer", DECODE_PEERS)
        yield from self._find_unknown("dtype", DTYPES)
        if self.memory_limit is not None and not 0 <= self.memory_limit < float("inf"):
            yield f"--memory-limit must be at least 0 and finite, got {self.memory_limit}"
