"""Named configurations, one JSON file each under `presets/`, holding the fields that differ from the defaults.

`tiny`             trains on 2 CPU cores in minutes; bytes (ByT5 tokenizer). It reads its local memory at the raw query
                   (`qk_projection="none"`), which measured best at this size (tests/benchmarks/LOG.md).
`tnt-150m`         TNT (arXiv 2511.07343), stage 1 with the local chunks {8}.
`titans-150m`      Titans (arXiv 2501.00663) as a TNT without a global memory, reset or projection.
`titans-mac-150m`, `titans-mag-150m`, `titans-mal-150m`
                   the Titans of the paper's section 4: the memory as a context, a gate and a layer beside attention.
`tnt-hybrid-150m`  TNT with full attention in every fourth block.
`tiny-mac`, `tiny-mag`, `tiny-mal`, `tiny-hybrid`
                   the same four on the memories and with the size of `tiny`.
`ttt-linear-125m`  TTT-Linear (arXiv 2407.04620), the same with TTT's token scale instead of momentum and forget gate.
`ttt-mlp-125m`     TTT-MLP.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def available_presets() -> list[str]:
    """The names that `TNTConfig.from_preset` accepts, sorted."""
    folder = resources.files(__package__).joinpath("presets")
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def load_preset(name: str) -> dict[str, Any]:
    """The fields of a preset. Raises ValueError for a name that does not exist, saying which ones do."""
    if name not in available_presets():
        raise ValueError(f"preset {name!r} does not exist; use one of {', '.join(available_presets())}")
    return json.loads(resources.files(__package__).joinpath("presets", f"{name}.json").read_text(encoding="utf-8"))
