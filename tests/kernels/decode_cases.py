"""Memories for the tests of the step of one token: cases, and one way to step them."""

from itertools import product

from memory_cases import KINDS, LOCAL_CASES, Case

from modeling_tnt.kernels import MemoryParams
from modeling_tnt.kernels.step import StepMemory

# Rows at the start of a shard, in mid-chunk, and at the end of a shard: within six tokens every boundary is crossed.
SMALL = {"head_dim": 16, "hidden": 32, "heads": 1, "batch": 3, "start": (8, 3, 15), "length": 6}
GLOBAL = {"is_global": True, "shard_length": None}
LINEAR = [
    Case(memory="linear", rule=rule, projection=projection, **SMALL)
    for rule, projection in product(
        ("plain", "momentum", "decay", "both", "token_scale"),
        ("none", "shard", "chunk", "shard_normalized", "chunk_normalized"),
    )
]
MIXED = [case.with_(**SMALL | {"heads": 2}) for case in LOCAL_CASES]
GLOBALS = [
    Case(**GLOBAL, **SMALL, memory=memory, rule=rule, norm=norm, bias=bias)
    for memory, rule, norm, bias in (
        ("mlp", "plain", True, True), ("mlp", "both", False, False), ("linear", "momentum", True, False),
        ("linear", "decay", False, True),
    )
]  # fmt: skip
TILED = [  # several tiles of hidden units, a width that is no power of two
    Case(**SMALL | {"hidden": 272, "batch": 1, "start": (6,), "length": 3}, rule="both", projection="shard"),
    Case(**SMALL | {"hidden": 48, "length": 2}, rule="token_scale", norm=False),
]


KIND_CASES = [
    Case(**SMALL, memory=memory, rule=rule, projection="shard", norm=norm, bias=norm)
    for memory, (rule, norm) in product(KINDS, (("both", True), ("token_scale", True), ("plain", False)))
] + [Case(**GLOBAL, **SMALL, memory=memory, rule="both") for memory in KINDS]


def step_memory(case, x, t):
    """The memory of a case with the gates of token t."""
    params = MemoryParams(**{n.removeprefix("params."): p for n, p in x.items() if n.startswith("params.")})
    gates = {name: x[name][:, t] if name in x else None for name in ("lr", "momentum", "decay")}
    if case.is_global:
        return StepMemory(
            params, chunk_size=case.chunk_size, is_global=True, memory_type=case.memory_type, update=case.update,
            **gates,
        )  # fmt: skip
    return StepMemory(
        params, chunk_size=case.chunk_size, shard_length=case.shard_length,
        qk_projection=case.projection.removesuffix("_normalized"),
        normalize_projection=case.projection.endswith("_normalized"), token_scale=x.get("token_scale"),
        memory_type=case.memory_type, **gates,
    )  # fmt: skip


def named(o, state):
    return {"o": o, **{f"state.{name}": t for name, t in state.tensors().items()}}


def several(rule, memory):
    """A global memory and three local ones whose chunks and shards differ."""
    shared = SMALL | {"rule": rule, "memory": memory, "length": 4, "batch": 2, "start": (3, 17)}
    return [
        Case(**shared | GLOBAL | {"chunk_size": 5, "rule": "plain" if rule == "token_scale" else rule}),
        Case(**shared | {"chunk_size": 1, "shard_length": 6, "projection": "shard", "seed": 1}),
        Case(**shared | {"chunk_size": 4, "shard_length": None, "projection": "chunk_normalized", "seed": 2}),
        Case(**shared | {"chunk_size": 3, "shard_length": 9, "seed": 3}),
    ]
