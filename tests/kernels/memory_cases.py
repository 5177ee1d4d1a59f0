"""What the tests of the memory operations share: cases, their inputs, one way to run them, one way to compare.

A case is hashable, so the slow reference runs once per case however many tests compare with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from modeling_tnt.kernels import FastWeights, MemoryParams, MemoryState, global_memory, local_memory
from modeling_tnt.kernels.memories.kinds import memory_kind, weight_shapes

FAST_BACKENDS = ("torch",)
BACKENDS = ("reference", *FAST_BACKENDS)

RULES = ("plain", "momentum", "decay", "both", "token_scale")
PROJECTIONS = ("none", "shard", "chunk", "shard_normalized", "chunk_normalized")
MEMORIES = ("linear", "mlp")  # those that every backend has
KINDS = ("mlp1", "mlp3", "swiglu")  # those that Triton does not have, with the depth of an MLP

# Results are compared to the largest entry of each tensor. In float64, rounding (1e-16) summed over some hundreds of
# operations and divided by the norm's deviation (rarely below 0.1 here) stays below 1e-12; a wrong term is above 1e-3.
FLOAT64_TOLERANCE = 1e-10
# float32 rounds at 6e-8; where the norm divides by a small deviation, these cases amplify that by up to 600 (seen for
# the reference and the torch backend alike: 4e-5), most by 50.
FLOAT32_TOLERANCE = 1e-4

# The native backend takes multiples of 16, and no float64.
NATIVE_SIZES = {"head_dim": 16, "hidden": 32, "dtype": torch.float32}

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call. `start`: positions of an initial state, one per row; None: no initial state. `lengths`: packed."""

    memory: str = "mlp"
    rule: str = "plain"
    projection: str = "none"
    norm: bool = True
    bias: bool = True
    is_global: bool = False
    chunk_size: int = 4
    shard_length: int | None = 8
    batch: int = 2
    length: int = 13
    heads: int = 2
    head_dim: int = 4
    hidden: int = 6
    start: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0
    update: str = "gradient"

    def __str__(self) -> str:
        words = ["global" if self.is_global else "local", self.memory, self.rule, self.projection]
        words += [] if self.norm else ["no_norm"]
        words += [] if self.bias else ["no_bias"]
        words += ["never_reset"] if self.shard_length is None and not self.is_global else []
        words += [] if self.update == "gradient" else [self.update]
        return "-".join(words)

    @property
    def rows(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def memory_type(self) -> str:
        return self.memory.rstrip("0123456789")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the fast weights that there are, without rows, by name."""
        depth = self.memory.removeprefix(self.memory_type)
        depth = int(depth) if depth else memory_kind(self.memory_type).depth
        return weight_shapes(self.memory_type, depth, self.heads, self.head_dim, self.hidden, self.bias)

    @property
    def amplification(self) -> float:
        """How much larger differences may be: Newton-Schulz multiplies rounding by up to 485, here by 20 as seen. Three
        maps without biases answer with little, which the norm blows up by 10 times as much as the others' answers."""
        if self.update == "muon":
            return 100.0
        return 10.0 if self.memory == "mlp3" and self.norm and not self.bias else 1.0

    @property
    def tolerance(self) -> float:
        exact = self.dtype == torch.float64
        return FLOAT64_TOLERANCE if exact else FLOAT32_TOLERANCE * self.amplification

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)

    def fit(self, backend: str) -> Case:
        """The same in sizes and a dtype that a backend takes."""
        return self.with_(**NATIVE_SIZES) if backend == "native" else self

    def runs_on(self, backend: str) -> bool:
        return backend != "native" or (self.memory_type in MEMORIES and self.update == "gradient")


# Every rule, projection and memory type, norm and biases on and off, with and without resets, in a few calls.
LOCAL_CASES = (
    Case(memory="linear", rule="plain", projection="none", norm=False, bias=False),
    Case(memory="mlp", rule="plain", projection="shard"),
    Case(memory="mlp", rule="both", projection="shard_normalized"),
    Case(memory="linear", rule="both", projection="chunk"),
    Case(memory="mlp", rule="token_scale", projection="chunk_normalized", norm=False),
    Case(memory="linear", rule="token_scale", projection="shard"),
    Case(memory="linear", rule="momentum", projection="shard_normalized", norm=False, bias=False, shard_length=None),
    Case(memory="mlp", rule="decay", projection="chunk", bias=False, shard_length=None),
)
GLOBAL_CASES = (
    Case(is_global=True, memory="mlp", rule="plain", shard_length=None),
    Case(is_global=True, memory="mlp", rule="both", shard_length=None),
    Case(is_global=True, memory="linear", rule="momentum", norm=False, shard_length=None),
    Case(is_global=True, memory="linear", rule="decay", bias=False, shard_length=None),
)
KIND_CASES = (
    Case(memory="mlp3", rule="both", projection="shard"),
    Case(memory="mlp3", rule="token_scale", bias=False, shard_length=None),
    Case(memory="mlp1", rule="momentum", projection="chunk"),
    Case(memory="swiglu", rule="both", projection="shard_normalized"),
    Case(memory="swiglu", rule="plain", norm=False, bias=False),
    Case(is_global=True, memory="swiglu", rule="both", shard_length=None),
    Case(is_global=True, memory="mlp3", rule="decay", bias=False, shard_length=None),
)
# Square, wide and tall matrices; a memory of another kind.
MUON_CASES = (
    Case(is_global=True, memory="mlp", rule="both", shard_length=None, update="muon"),
    Case(is_global=True, memory="mlp", rule="plain", norm=False, hidden=3, shard_length=None, update="muon"),
    Case(is_global=True, memory="linear", rule="momentum", bias=False, shard_length=None, update="muon"),
    Case(is_global=True, memory="linear", rule="decay", norm=False, shard_length=None, update="muon"),
    Case(is_global=True, memory="swiglu", rule="plain", norm=False, shard_length=None, update="muon"),
)
CASES = LOCAL_CASES + GLOBAL_CASES + KIND_CASES + MUON_CASES

native = pytest.param("native", marks=pytest.mark.native)


def calls(backends: Sequence[str]) -> pytest.MarkDecorator:
    """Every case on each of these backends that runs it, as a test's `backend` and `case`."""
    return pytest.mark.parametrize(
        "backend, case",
        [
            pytest.param(b, case.fit(b), id=f"{b}-{case}", marks=native.marks if b == "native" else ())
            for case in CASES
            for b in backends
            if case.runs_on(b)
        ],
    )


def random_case(seed: int, memories: Sequence[str]) -> Case:
    """Any combination of sizes, positions, packing and rules."""
    rng = random.Random(seed)
    chunk_size = rng.choice((1, 2, 3, 4, 5, 7, 8))
    is_global = rng.random() < 0.25
    length, rows = rng.randint(1, 30), rng.randint(1, 4)
    case = Case(
        memory=rng.choice(memories),
        rule=rng.choice(RULES[:4] if is_global else RULES),
        projection="none" if is_global else rng.choice(PROJECTIONS),
        norm=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        is_global=is_global,
        chunk_size=chunk_size,
        shard_length=None if is_global or rng.random() < 0.3 else chunk_size * rng.randint(1, 4),
        batch=rows,
        length=length,
        heads=rng.randint(1, 3),
        hidden=rng.randint(1, 9),
        start=tuple(rng.randint(0, 40) for _ in range(rows)) if rng.random() < 0.5 else None,
        seed=seed,
    )
    if rng.random() < 0.4:
        ends = sorted(rng.randint(0, length) for _ in range(rows - 1))
        lengths = tuple(b - a for a, b in zip([0, *ends], [*ends, length], strict=True))
        if 0 in lengths and case.start is not None and case.projection.startswith("chunk"):
            # An empty row at a chunk's start has a projection of zero by contract, so a gradient of it means nothing.
            case = case.with_(start=None)
        case = case.with_(batch=1, lengths=lengths)
    return case


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Leaf tensors by name ("q", "params.w1", "initial.weights.w1", …), all of which require a gradient.

    Keys have length 1 and weights fan-in scale (twice that in front of a norm, which over four entries now and then
    divides by a small deviation), as in a model: the inner loop then neither dies nor explodes.
    """
    scale = 2 if case.norm else 1
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    B, T, H, D = case.batch, case.length, case.heads, case.head_dim
    x = {"q": normal(B, T, H, D), "k": normal(B, T, H, D), "v": normal(B, T, H, D)}
    x["k"] = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    x["lr"] = uniform(B, T, H, low=0.05, high=0.5)
    if case.rule in ("momentum", "both"):
        x["momentum"] = uniform(B, T, H, low=0.1, high=0.9)
    if case.rule in ("decay", "both"):
        # Weights that have decayed to nothing make the norm divide by nothing, and every comparison ill-conditioned.
        x["decay"] = uniform(B, T, H, low=0.01, high=0.15)
    if case.rule == "token_scale":
        x["token_scale"] = uniform(case.chunk_size, low=0.3, high=1.0)

    shapes = case.shapes
    for name, shape in shapes.items():
        x[f"params.{name}"] = normal(*shape, std=scale * shape[-2] ** -0.5)
    if case.norm:
        x["params.norm_weight"] = uniform(H, D, low=0.5, high=1.5)
        x["params.norm_bias"] = normal(H, D, std=0.3)

    if case.start is not None:
        # The three groups are drawn independently: a stored anchor that must not be used would show in the result.
        groups = ("weights", "anchor") + (("momentum",) if "momentum" in x else ())
        for group in groups:
            for name, shape in shapes.items():
                x[f"initial.{group}.{name}"] = normal(case.rows, *shape, std=shape[-2] ** -0.5)
        if case.projection != "none":
            keys = normal(case.rows, H, 3, D)
            keys = keys / keys.norm(dim=-1, keepdim=True)
            x["initial.projection"] = torch.einsum("nhti,nhtj->nhij", keys, keys)
            if case.projection.startswith("chunk"):
                at_start = torch.tensor([s % case.chunk_size == 0 for s in case.start])
                x["initial.projection"][at_start] = 0
    return {name: t.to(case.dtype).requires_grad_() for name, t in x.items()}


def call(
    case: Case,
    backend: str,
    x: dict[str, Tensor],
    *,
    state: MemoryState | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, MemoryState | None]:
    """Run one case on named inputs. `state` replaces the initial state that is among the inputs."""
    params = MemoryParams(**{n.removeprefix("params."): t for n, t in x.items() if n.startswith("params.")})
    if state is None and case.start is not None:
        state = first_state(case, x)
    if cu_seqlens is None and case.lengths is not None:
        cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()])
    shared = {
        "chunk_size": case.chunk_size,
        "momentum": x.get("momentum"),
        "decay": x.get("decay"),
        "cu_seqlens": cu_seqlens,
        "initial_state": state,
        "output_final_state": output_final_state,
        "memory_type": case.memory_type,
        "backend": backend,
    }
    qkv_lr = (x["q"], x["k"], x["v"], x["lr"])
    if case.is_global:
        return global_memory(*qkv_lr, params, update=case.update, **shared)
    return local_memory(
        *qkv_lr,
        params,
        shard_length=case.shard_length,
        qk_projection=case.projection.removesuffix("_normalized"),
        normalize_projection=case.projection.endswith("_normalized"),
        token_scale=x.get("token_scale"),
        **shared,
    )


def pick(x: dict[str, Tensor], rows: slice, tokens: slice) -> dict[str, Tensor]:
    """The inputs with some rows and tokens only (parameters, token scale and initial state as they are)."""
    per_token = ("q", "k", "v", "lr", "momentum", "decay")
    return {name: t[rows, tokens] if name in per_token else t for name, t in x.items()}


def summarize(o: Tensor, state: MemoryState | None, x: dict[str, Tensor]) -> Result:
    """Outputs, final state and the gradient of every input for random, fixed upstream gradients of both."""
    outputs = {"o": o}
    if state is not None:
        outputs |= {f"state.{name}": t for name, t in state.tensors().items() if name != "position"}
    g = torch.Generator().manual_seed(1)
    loss = 0.0
    for t in outputs.values():
        upstream = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)
        loss = loss + (t * upstream).sum(dtype=torch.promote_types(t.dtype, torch.float32))
    grads = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
    result = {name: t.detach() for name, t in outputs.items()}
    for (name, t), grad in zip(x.items(), grads, strict=True):
        result[f"grad.{name}"] = torch.zeros_like(t) if grad is None else grad
    if state is not None:
        result["position"] = state.position
    return result


def run(case: Case, backend: str) -> Result:
    x = make_inputs(case)
    return summarize(*call(case, backend, x), x)


def run_in_pieces(case: Case, backend: str, cuts: Sequence[int]) -> Result:
    """The same call cut before the given tokens; each piece goes on from the final state of the one before."""
    x = make_inputs(case)
    outputs, state = [], None
    for start, end in zip([0, *cuts], [*cuts, case.length], strict=True):
        o, state = call(case, backend, pick(x, slice(None), slice(start, end)), state=state)
        outputs.append(o)
    return summarize(torch.cat(outputs, 1), state, x)


def run_packed_separately(case: Case, backend: str) -> Result:
    """Each packed sequence in a call of its own; an empty one keeps its initial state."""
    x = make_inputs(case)
    alone = case.with_(lengths=None, batch=1)
    initial = first_state(case, x)
    outputs, states, start = [], [], 0
    for row, length in enumerate(case.lengths):
        state = initial.map(lambda t, row=row: t[row : row + 1])
        if length:
            o, state = call(alone, backend, pick(x, slice(0, 1), slice(start, start + length)), state=state)
            outputs.append(o)
        states.append(state)
        start += length
    flat = [state.tensors() for state in states]
    state = MemoryState.from_tensors({name: torch.cat([t[name] for t in flat]) for name in flat[0]})
    return summarize(torch.cat(outputs, 1), state, x)


def first_state(case: Case, x: dict[str, Tensor]) -> MemoryState:
    """The state before the first token of a case: the one among its inputs, or one made of the parameters."""
    if case.start is not None:
        flat = {n.removeprefix("initial."): t for n, t in x.items() if n.startswith("initial.")}
        return MemoryState.from_tensors(flat | {"position": torch.tensor(case.start)})
    names = [n for n in FastWeights._fields if f"params.{n}" in x]
    weights = FastWeights(**{n: x[f"params.{n}"].expand(case.rows, *x[f"params.{n}"].shape) for n in names})
    momentum = weights.map(torch.zeros_like) if "momentum" in x else None
    H, D = case.heads, case.head_dim
    projection = None if case.projection == "none" else torch.zeros(case.rows, H, D, D, dtype=case.dtype)
    return MemoryState(weights, weights, momentum, projection, torch.zeros(case.rows, dtype=torch.int64))


@cache
def reference_result(case: Case) -> Result:
    return run(case, "reference")


def assert_same(got: Result, want: Result, tolerance: float = FLOAT64_TOLERANCE) -> None:
    """Every entry of every tensor within `tolerance` times the tensor's largest entry (or 1, if that is larger)."""
    assert got.keys() == want.keys()
    wrong = []
    for name, expected in want.items():
        actual = got[name]
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        scale = max(1.0, expected.double().abs().max().item() if expected.numel() else 0.0)
        if not error <= tolerance * scale:  # also true for NaN
            wrong.append(f"{name}: off by {error:.2e}, largest entry {scale:.2e}")
    assert not wrong, "\n".join(wrong)
