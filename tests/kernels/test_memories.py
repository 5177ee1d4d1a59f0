"""Kinds of memory: their formulas against autograd, and what is said of parameters and names that fit none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from memory_cases import KINDS, MEMORIES, Case, assert_same, make_inputs, run
from torch import Tensor

from modeling_tnt.kernels import MemoryParams, local_memory
from modeling_tnt.kernels.memories import kinds
from modeling_tnt.kernels.memories.kind import MemoryKind, Stage
from modeling_tnt.kernels.memories.kinds import memory_kind, memory_types, register_memory
from modeling_tnt.kernels.memories.mlp import Gelu
from modeling_tnt.kernels.memories.swiglu import SiluGate
from modeling_tnt.kernels.types import FastWeights

JOINTS = {"gelu": (Gelu(), 1), "silu gate": (SiluGate(), 2)}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64, some ten operations


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", JOINTS)
def test_a_joints_derivatives_are_those_of_its_value(name: str):
    joint, count = JOINTS[name]
    torch.manual_seed(0)
    ys = [(3 * draw(50)).requires_grad_() for _ in range(count)]
    grad, grads, plus = draw(50).requires_grad_(), [draw(50) for _ in ys], [draw(50) for _ in ys]
    tape = joint.forward(*ys)
    first = torch.autograd.grad(tape.value, ys, grad, create_graph=True)
    want_grad, *want_ys = torch.autograd.grad(first, [grad, *ys], grads)
    with torch.no_grad():
        tape = joint.forward(*ys)
        slopes = joint.slopes(tape)
        for got, want, more in zip(
            joint.backward(tape, slopes, grad, [p.clone() for p in plus]), first, plus, strict=True
        ):
            torch.testing.assert_close(got, want + more, **TIGHT)
        for got, want in zip(joint.backward(tape, slopes, grad), first, strict=True):
            torch.testing.assert_close(got, want, **TIGHT)
        for got, want in zip(joint.backward(tape, slopes, grad.clone(), overwrite=True), first, strict=True):
            torch.testing.assert_close(got, want, **TIGHT)
        for got, want in zip(joint.gradients(ys, grad), first, strict=True):
            torch.testing.assert_close(got, want, **TIGHT)
        got_grad, got_ys = joint.second(tape, slopes, grad, [g.clone() for g in grads])
        written = torch.empty(50, dtype=torch.float64)
        joint.write(ys, written)
    torch.testing.assert_close(written, tape.value, **TIGHT)
    torch.testing.assert_close(got_grad, want_grad, **TIGHT)
    for got, want in zip(got_ys, want_ys, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("memory", [*MEMORIES, *KINDS])
def test_stages_compute_the_definition(memory: str):
    x = make_inputs(Case(memory=memory, length=1))
    kind = memory_kind(Case(memory=memory).memory_type)
    weights = FastWeights(
        **{n.removeprefix("params."): t[0] for n, t in x.items() if n[:8] in ("params.w", "params.b")}
    )

    def linear(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return h @ w if b is None else h @ w + b

    q = h = x["q"][0, 0]
    for stage in kind.stages(len(weights.maps)):
        ys = [linear(h, *weights.maps[i]) for i in stage.maps]
        h = ys[0] if stage.joint is None else stage.joint.forward(*ys).value
    torch.testing.assert_close(h, kind.forward(weights, q, linear), **TIGHT)


def call(params: MemoryParams, memory_type: str | None) -> None:
    q = torch.zeros(1, 2, 1, 4)
    local_memory(q, q, q, q[..., 0], params, chunk_size=2, qk_projection="none", memory_type=memory_type)


@pytest.mark.parametrize(
    ("shapes", "memory_type", "message"),
    [
        ({"w1": (4, 6), "w3": (6, 4)}, "mlp", "params.w2 is missing before others; number the weights from w1 on"),
        ({"w1": (4, 6), "w2": (6, 4)}, "swiglu", "a SwiGLU memory has three maps, w1, w2 and w3, got the weights of 2"),
        ({"w1": (4, 4), "w2": (4, 4)}, "linear", "a linear memory has one map, got the weights of 2"),
        ({"w1": (4, 6), "w2": (6, 6), "w3": (4, 6)}, "swiglu", "params.w2 must have shape [H, M, D] = (1, 6, 4)"),
        ({"w1": (4, 6), "w2": (6, 4), "w3": (6, 4)}, None, "params.w2 must have shape [H, M, M] = (1, 6, 6)"),
        ({"w1": (4, 4)}, "cubic", "memory_type='cubic' is unknown; use one of 'mlp', 'linear', 'swiglu'"),
    ],
)
def test_parameters_that_fit_no_kind(shapes: dict, memory_type: str | None, message: str):
    params = MemoryParams(**{name: torch.zeros(1, *shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError) as error:
        call(params, memory_type)
    assert message in str(error.value)


def test_the_readmes_memory_equals_the_reference_and_decodes(tmp_path, monkeypatch):
    """The worked example of kernels/README.md: a kind that the package does not know, trained, saved and read back."""
    readme = (Path(kinds.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    source = re.search(r"## Add a memory\n.*?```python\n(.*?)```", readme, flags=re.DOTALL)[1]
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(source, "kernels/README.md", "exec"), names)
    case = Case(memory="relu", rule="both", projection="shard")
    kinds._KINDS["relu"] = names["SquaredReluMemory"]()  # a case reads a number at the end of a name as a depth
    assert_same(run(case, "torch"), run(case, "reference"))
    trained, again, text = names["model"].eval(), names["again"], names["text"]
    with torch.no_grad():
        assert torch.equal(trained(text).logits, again(text).logits)
        assert torch.equal(again(text).logits[:, -9:-1].argmax(-1), text[:, -8:])


def test_a_name_is_registered_once():
    class Again(MemoryKind):
        name, words, depth = "mlp", "", 1

        def shapes(self, head_dim: int, hidden: int, maps: int | None) -> tuple[tuple[int, int], ...]:
            return ((head_dim, head_dim),)

        def stages(self, maps: int) -> tuple[Stage, ...]:
            return (Stage((0,)),)

        def forward(self, weights: FastWeights, x: Tensor, linear) -> Tensor:
            return linear(x, weights.w1, weights.b1)

    with pytest.raises(ValueError, match="memory_type 'mlp' is taken by MLPMemory"):
        register_memory(Again())
    with pytest.raises(TypeError, match="kind must be a MemoryKind, got ABCMeta"):
        register_memory(Again)
    assert memory_types() == ("mlp", "linear", "swiglu")
