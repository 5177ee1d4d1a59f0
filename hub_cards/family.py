"""Which of the papers' models a configuration is, in words."""

from __future__ import annotations

from typing import Any

_READING = (
    "Its token mixer is a set of small memories, {memory} in each head, that are trained while reading: every token "
    "does one step of gradient descent on ½‖f(W, k) − v‖². Their state does not grow with the text."
)
_BESIDE = {
    "context": "Titans' MAC: within a segment of {segment:,} tokens, the chunk of the global memory, it attends to the "
    "segment and to what that memory says of it, and the memories read the outcome",
    "gate": "Titans' MAG: it attends within {window:,} tokens, and the memories gate the outcome",
    "layer": "Titans' MAL: it attends within {window:,} tokens to what the memories say",
}


def describe_family(config: dict[str, Any]) -> str:
    """ "TNT", "Titans", "TTT-Linear" or "TTT-MLP", or "TTT" for other kinds of memory.

    TNT has a global memory, resets its local ones or reads them through the Q-K projection; without all of that a
    memory with momentum or a forget gate is that of Titans, and one with neither that of TTT. A global memory alone,
    as a context of attention, is Titans' as well.
    """
    if config.get("memory_as") == "context" and not config.get("local_chunk_sizes"):
        return "Titans"
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
    """What the model is, in a few sentences of Markdown."""
    reading = " ".join([_READING.format(memory=describe_memory(config)), *describe_attention(config)])
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


def describe_attention(config: dict[str, Any]) -> list[str]:
    """Which blocks attend, how far and what for, in sentences; none for a model of memories alone."""
    kinds, window = config.get("layer_types") or [], config.get("sliding_window")
    sentences = []
    for kind, reach in (
        ("full_attention", "all earlier tokens, whose keys and values grow with the text"),
        ("sliding_attention", f"the last {window} tokens"),
    ):
        if kind in kinds:
            numbers = ", ".join(str(i + 1) for i, other in enumerate(kinds) if other == kind)
            several = kinds.count(kind) > 1
            sentences.append(
                f"Of its {len(kinds)} blocks, {'numbers' if several else 'number'} {numbers} "
                f"ha{'ve' if several else 's'} attention to {reach}, instead of memories."
            )
    beside = _BESIDE.get(config.get("memory_as"))
    if beside is not None:
        words = beside.format(segment=config.get("global_chunk_size") or 0, window=window or 0)
        sentences.append(f"A block of memories has attention beside them as {words}.")
    if sentences and config.get("num_persistent_tokens"):
        sentences.append(f"All attention sees {config['num_persistent_tokens']} learned tokens before the first one.")
    return sentences


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
