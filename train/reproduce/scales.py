"""The scales of the reproduction, as data: what every row's recipe has in common, and how each row differs.

A row's fields are laid over the common ones, which are laid over a recipe that is shipped, if one is named. To change a
scale change this file only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scale:
    """One size of the whole table.

    help            what it is for, and how long it takes.
    common          recipe fields of every row, nested as in YAML.
    rows            recipe fields by row, laid over the common ones; a `recipe` names a shipped one to begin with.
    width_step      None: feed-forward widths are as the recipes say. Otherwise every TNT, Titans and TTT model gets the
                    multiple of it that brings its number of parameters nearest to that of the row `tnt-1`.
    """

    help: str
    rows: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    width_step: int | None = None


def _rows(
    *, tnt: dict[str, Any], local: list[list[int]], large: int, stages: list[dict[str, Any]], stage2: list[int],
    hybrid: dict[str, Any], window: int, persistent: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The rows of a scale whose models are a preset with changes.

    Args:
        tnt: the configuration that all TNT rows share.
        local: chunk sizes of the rows with 0, 1, … local memories.
        large: chunk size of the Titans row with large chunks.
        stages: of all rows; the first one alone, but for the rows with a second.
        stage2: local chunk sizes of the second stage.
        hybrid: what makes some blocks of the TNT model attend.
        window: tokens that Titans' attention sees; of the memory as a context the segment.
        persistent: its persistent tokens.

    Where the TNT rows have the Q-K projection, as in the paper, the ablation is the row without; where they read at raw
    queries, it is the row with.
    """
    base = {**tnt, "local_chunk_sizes": local[1]}
    # As the presets of the papers have them: no global memory, no reset, no projection.
    alone = {**base, "global_chunk_size": None, "local_shard_lengths": None, "qk_projection": "none",
             "normalize_projection": False}  # fmt: skip
    titans = {**alone, "use_momentum": True, "use_forget_gate": True}
    attends = {**titans, "num_persistent_tokens": persistent}
    ttt = {**alone, "token_scale": True, "memory_norm_init": 1.0}
    models = {
        "titans-large": {**titans, "local_chunk_sizes": [large]},
        "titans-small": titans,
        "ttt-linear": {**ttt, "memory_type": "linear", "memory_expansion": 1, "memory_base_lr": 1.0},
        "ttt-mlp": {**ttt, "memory_expansion": 4, "memory_base_lr": 0.1},
        **{f"tnt-{n}": {**base, "local_chunk_sizes": chunks} for n, chunks in enumerate(local)},
        "no-global": {**base, "global_chunk_size": None},
        **(
            {"projection": {**base, "qk_projection": "shard"}}
            if tnt["qk_projection"] == "none"
            else {"no-projection": {**base, "qk_projection": "none", "normalize_projection": False}}
        ),
        "hybrid": {**base, **hybrid},
        "titans-mac": {**attends, "memory_as": "context", "global_chunk_size": window, "local_chunk_sizes": []},
        "titans-mag": {**attends, "memory_as": "gate", "sliding_window": window},
        "titans-mal": {**attends, "memory_as": "layer", "sliding_window": window},
        "more-steps": base,
        "stage2": base,
    }
    rows = {"llama": {"model": {"architecture": "llama", "override": base}, "stages": stages[:1]}}
    rows |= {key: {"model": {"override": model}, "stages": stages[:1]} for key, model in models.items()}
    rows["more-steps"]["stages"] = stages
    rows["stage2"]["stages"] = [stages[0], {**stages[1], "local_chunk_sizes": stage2}]
    return rows


_SMOKE = Scale(
    help="a few steps of a tiny model, to see that everything works; its numbers say nothing",
    common={
        "model": {"preset": "tiny"},
        "data": {"limit_megabytes": 1.0},
        "training": {"seq_len": 64, "batch_size": 2},
        "output": {"eval_tokens": 256, "sample_tokens": 0, "keep_checkpoints": 1},
    },
    rows=_rows(
        tnt={"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 64,
             "global_chunk_size": 32, "local_shard_lengths": 32, "qk_projection": "shard"},
        local=[[], [8], [8, 16], [4, 8, 16], [4, 8, 16, 32]],
        large=32,
        stages=[{"name": "stage1", "steps": 6}, {"name": "stage2", "share": 0.5}],
        stage2=[2],
        hybrid={"num_hidden_layers": 2, "full_attention_interval": 2},
        window=16,
        persistent=2,
    ),
    width_step=8,
)  # fmt: skip

_SMALL = Scale(
    help="models of 0.6M parameters on 0.3M bytes of Python's standard library; 40 minutes on 2 CPU cores",
    common={
        "model": {"preset": "tiny"},
        "training": {"seq_len": 512, "batch_size": 4},
        "optimizer": {"learning_rate": 3e-3},
        "output": {
            "eval_tokens": 131072, "sample_tokens": 0, "keep_checkpoints": 1, "checkpoint_every": 40,
            "health_every": 100,
        },
    },
    rows=_rows(
        tnt={"num_hidden_layers": 2, "global_chunk_size": 64, "local_shard_lengths": 128, "qk_projection": "none"},
        local=[[], [16], [8, 16], [8, 16, 32], [4, 8, 16, 32]],
        large=128,
        stages=[{"name": "stage1", "tokens": 300e3}, {"name": "stage2", "share": 0.05}],
        stage2=[4],
        hybrid={"full_attention_interval": 2},
        window=64,
        persistent=4,
    ),
    width_step=8,
)  # fmt: skip

_PAPER_RECIPES = {
    "llama": "llama-150m", "titans-large": "titans-150m-c256", "titans-small": "titans-150m-c8",
    "ttt-linear": "ttt-linear-125m", "ttt-mlp": "ttt-mlp-125m", "tnt-0": "table3-0-memories",
    "tnt-1": "table3-1-memory", "tnt-2": "table3-2-memories", "tnt-3": "table3-3-memories",
    "tnt-4": "table3-4-memories", "no-global": "table3-no-global", "no-projection": "table3-no-projection",
    "more-steps": "tnt-150m", "stage2": "tnt-150m", "hybrid": "tnt-hybrid-150m", "titans-mac": "titans-mac-150m",
    "titans-mag": "titans-mag-150m", "titans-mal": "titans-mal-150m",
}  # fmt: skip
_PAPER_ROWS: dict[str, dict[str, Any]] = {row: {"recipe": name} for row, name in _PAPER_RECIPES.items()}
_PAPER_ROWS["more-steps"]["stages"] = [{"name": "stage1", "tokens": 10e9}, {"name": "stage2", "share": 0.05}]

_MEDIUM_STAGES = [{"name": "stage1", "tokens": 200e6}, {"name": "stage2", "share": 0.05}]

_MEDIUM = Scale(
    help="models of 30M parameters on 0.2 billion tokens of C4, for one GPU; not run yet",
    common={
        "recipe": "tnt-150m",
        # 0.2 billion tokens of T5's tokenizer have about 0.9 GB of text.
        "data": {"limit_megabytes": 1000.0, "validation_share": 0.005},
        "training": {"seq_len": 4096, "batch_size": 32, "micro_batch_size": 8},
        "output": {"checkpoint_every": 250, "eval_every": None, "keep_checkpoints": 1, "sample_tokens": 0},
    },
    rows=_rows(
        tnt={"hidden_size": 384, "num_hidden_layers": 6, "num_heads": 6, "intermediate_size": 1024,
             "tie_word_embeddings": True, "global_chunk_size": 512, "local_shard_lengths": 1024,
             "qk_projection": "shard"},
        local=[[], [8], [8, 16], [4, 8, 16], [4, 8, 16, 32]],
        large=256,
        stages=_MEDIUM_STAGES,
        stage2=[1],
        hybrid={"full_attention_interval": 3},
        window=256,
        persistent=16,
    ),
    width_step=64,
)  # fmt: skip

_PAPER = Scale(
    help="models of 150M parameters on 10 billion tokens of C4: the shipped recipes as they are; for many GPU hours; "
    "not run yet",
    rows=_PAPER_ROWS,
)

SCALES = {"smoke": _SMOKE, "small": _SMALL, "medium": _MEDIUM, "paper": _PAPER}
