"""Which of the papers' models a configuration is, in words."""

from __future__ import annotations

from typing import Any

_READING = (
    "Its token mixer is a set of small memories, {memory} in each head, that are trained while reading: every token "
    "does one step of gradient descent on ½‖f(W, k) − v‖². Their state does not grow with the text."
)


def describe_family(config: dict[str, Any]) -> str:
    """ "TNT", "Titans", "TTT-Linear" or "TTT-MLP", or "TTT" for other kinds of memory.

    TNT has a global memory, resets its local ones or reads them through the Q-K projection; without all of that a
    memory with momentum or a forget gate is that of Titans, and one with neither that of TTT.
    """
    if config.get("global_chunk_size") or _is_reset(config) or config.get("qk_projection", "none") != "none":
        return "TNT"
    if config.get("use_momentum") or config.get("use_forget_gate"):
        return "Titans"
    if config.get("memory_type", "mlp") in ("linear", "mlp"):
        return "TTT-Linear" if config.get("memory_type") == "linear" else "TTT-MLP"
    return "TTT"


def describe_memory(config: dict[str, Any]) -> str:
    """The memory of a head in words: "an MLP", "a linear map", …"""
    from ..kernels.memories.kinds import memory_kind, memory_types  # imports torch

    name = config.get("memory_type", "mlp")
    if name not in memory_types():  # a kind that was registered elsewhere
        return f"a {name} network"
    kind, depth = memory_kind(name), config.get("memory_depth")
    return kind.words if depth in (None, kind.depth) else f"{kind.words} of {depth} layers"


def describe_model(config: dict[str, Any]) -> str:
    """What the model is, in two or three sentences of Markdown."""
    reading = _READING.format(memory=describe_memory(config))
    family = describe_family(config)
    if family == "TNT":
        return f"{_describe_tnt(config)} {reading}"
    if family == "Titans":
        gates = [word for key, word in (("use_momentum", "momentum"), ("use_forget_gate", "a forget gate"))
                 if config.get(key)]  # fmt: skip
        return (
            "A language model with the memory of Titans ([arXiv 2501.00663](https://arxiv.org/abs/2501.00663)), whose "
            f"inner optimizer has {' and '.join(gates)}. {reading}"
        )
    return f"A {family} language model ([arXiv 2407.04620](https://arxiv.org/abs/2407.04620)). {reading}"


def _describe_tnt(config: dict[str, Any]) -> str:
    count, wide = len(config.get("local_chunk_sizes") or []), config.get("global_chunk_size")
    local = f"{count} local memor{'y' if count == 1 else 'ies'} that read{'s' if count == 1 else ''} in small chunks"
    parts = [*(["a global memory that reads in large chunks"] if wide else []), *([local] if count else [])]
    paper = "([arXiv 2511.07343](https://arxiv.org/abs/2511.07343))"
    return f"A TNT language model {paper} with {' and '.join(parts) or 'no memory'}."


def _is_reset(config: dict[str, Any]) -> bool:
    lengths = config.get("local_shard_lengths")
    return bool(config.get("local_chunk_sizes")) and any(
        length is not None for length in (lengths if isinstance(lengths, list) else [lengths])
    )
