"""The local memory as two operators, forward and backward, that launch the kernels.

Operators, so that `torch.compile` and activation checkpointing see one node each. The forward keeps the state before
every group of `interval` chunks; the backward goes through the groups from last to first, and for each launches
recompute.py, which writes the states before the group's tiles, and backward.py, which reads them. So n chunks cost
n / interval kept states and `interval` traced ones instead of n.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import OPERATORS, operator
from ..segment_scan import EndState, Gradients, ScanInputs, differentiate, gradients_like_inputs
from .backward import backward_kernel
from .forward import forward_kernel
from .limits import gradient_dtype
from .projection import projection_kernel
from .projection_keys import projection_keys_kernel
from .projection_queries import projection_queries_kernel
from .recompute import recompute_kernel


class Plan(NamedTuple):
    """The sizes of a call: plain ints (and 0/1), so that an operator can take them as a list.

    hidden         M, the width of the first layer's output (D for a linear memory)
    is_mlp, has_b1, has_b2
    chunk_size     C
    projection     0 none, 1 since the last reset, 2 since the start of the chunk; normalize: 0 or 1
    multi          whether a tile's anchor may differ from its current state
    max_chunks     chunks of the longest segment
    interval       chunks of a group; 0 to keep nothing for a backward
    ends           rows of the end state
    rows, …, tall  see `Tiles`
    """

    hidden: int
    is_mlp: int
    has_b1: int
    has_b2: int
    chunk_size: int
    projection: int
    normalize: int
    multi: int
    max_chunks: int
    interval: int
    ends: int
    rows: int
    projection_rows: int
    forward_warps: int
    recompute_warps: int
    backward_warps: int
    forward_stages: int
    backward_stages: int
    tall: int

    @property
    def groups(self) -> int:
        return -(-self.max_chunks // self.interval)

    @property
    def tiles(self) -> int:
        """Tiles of a chunk."""
        return -(-self.chunk_size // self.rows)


def scan_segments(inputs: ScanInputs, segments: Tensor, plan: Plan) -> tuple[Tensor, EndState]:
    """Read independent segments, S rows of 5 numbers on the device (see forward.py): `segments.segment_table`.

    Returns o [tokens, H, D] and the end states.
    """
    o, *outputs = OPERATORS.fused_forward(*inputs, segments, list(plan))
    return o, EndState.from_outputs(outputs, inputs)


def _sizes(inputs: ScanInputs, plan: Plan) -> dict[str, object]:
    """The constexpr arguments that all kernels of the memory share."""
    _, H, D = inputs.q.shape
    return {
        "H": H, "D": D, "M": plan.hidden, "P": inputs.weights.shape[-1], "C": plan.chunk_size, "R": plan.rows,
        "MLP": bool(plan.is_mlp), "HAS_B1": bool(plan.has_b1), "HAS_B2": bool(plan.has_b2),
        "NORM": inputs.norm_weight is not None, "MOMENTUM": inputs.momentum is not None,
        "DECAY": inputs.decay is not None, "SCALE": inputs.scale is not None, "MULTI": bool(plan.multi),
        "TALL": bool(plan.tall), "PRECISION": precision(inputs.q.dtype),
    }  # fmt: skip


def _launch(warps: int, stages: int) -> dict[str, int]:
    """The compiler's options. Left to itself, its assembler gives some kernels 32 registers on sm_80, and spills."""
    return {"num_warps": warps, "num_stages": stages, "maxnreg": min(255, 65536 // (32 * warps))}


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied, by torch's own setting; those of float16's gradients have no more digits.

    Three TensorFloat-32 products come within rounding of one in float32; real float32 products ("ieee") would go past
    the tensor cores, and past a memory kernel's registers.
    """
    return "tf32x3" if dtype != torch.float16 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def _projection_sizes(inputs: ScanInputs, plan: Plan) -> dict[str, object]:
    """The constexpr arguments that all kernels of the projection share."""
    _, H, D = inputs.q.shape
    per_chunk, R = plan.projection == 2, plan.projection_rows
    return {
        "H": H, "D": D, "C": plan.chunk_size if per_chunk else R, "R": R, "PER_CHUNK": per_chunk,
        "PRECISION": precision(inputs.q.dtype), **_launch(4, stages=1),
    }  # fmt: skip


def _project(inputs: ScanInputs, segments: Tensor, plan: Plan, end_projection: Tensor | None) -> Tensor:
    """The projected queries."""
    x = torch.empty_like(inputs.q)
    projection_kernel[(segments.shape[0], inputs.q.shape[1])](
        inputs.q, inputs.k, segments, inputs.projection, x, end_projection,
        **_projection_sizes(inputs, plan), NORMALIZE=bool(plan.normalize),
    )  # fmt: skip
    return x


def _forward_outputs(inputs: ScanInputs, segments: int, plan: Plan) -> dict[str, Tensor]:
    """Unwritten outputs by the names of the forward kernel's arguments, those that are there."""
    _, H, D = inputs.q.shape
    P = inputs.weights.shape[-1]
    state = functools.partial(inputs.q.new_empty, dtype=torch.float32)
    out = {"o": torch.empty_like(inputs.q), "end_weights": state(plan.ends, H, P), "end_anchor": state(plan.ends, H, P)}
    if inputs.momentum is not None:
        out["end_momentum"] = state(plan.ends, H, P)
    if plan.projection:
        out["end_projection"] = state(plan.ends, H, D, D)
    if plan.interval:
        kept = plan.groups - 1
        out["kept_weights"] = state(kept, segments, H, P)
        if inputs.momentum is not None:
            out["kept_momentum"] = state(kept, segments, H, P)
    return out


def _fake_forward(*arguments) -> list[Tensor]:
    *tensors, segments, plan = arguments
    return list(_forward_outputs(ScanInputs(*tensors), segments.shape[0], Plan(*plan)).values())


@operator(_fake_forward)
def fused_forward(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, decay: Tensor | None, scale: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    weights: Tensor, anchor: Tensor | None, momentum_state: Tensor | None, projection: Tensor | None,
    segments: Tensor, plan: list[int],
) -> list[Tensor]:  # fmt: skip
    """o, the end states, and the states kept for the backward."""
    inputs = ScanInputs(
        q, k, v, lr, momentum, decay, scale, norm_weight, norm_bias, weights, anchor, momentum_state, projection
    )
    sizes = Plan(*plan)
    S = segments.shape[0]
    out = _forward_outputs(inputs, S, sizes)
    with torch.cuda.device_of(q):  # kernels are launched on the current device
        x = _project(inputs, segments, sizes, out.get("end_projection")) if sizes.projection else q
        forward_kernel[(S, q.shape[1])](
            x, k, v, lr, momentum, decay, scale, norm_weight, norm_bias, segments, weights, anchor, momentum_state,
            out["o"], out["end_weights"], out["end_anchor"], out.get("end_momentum"),
            out.get("kept_weights"), out.get("kept_momentum"), sizes.interval, S,
            **_sizes(inputs, sizes), KEEP=sizes.interval > 0, **_launch(sizes.forward_warps, sizes.forward_stages),
        )  # fmt: skip
    return list(out.values())


@operator(gradients_like_inputs)
def fused_backward(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, decay: Tensor | None, scale: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    weights: Tensor, anchor: Tensor | None, momentum_state: Tensor | None, projection: Tensor | None,
    kept: list[Tensor], grad_o: Tensor, grad_ends: list[Tensor], segments: Tensor, plan: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors before `kept` that are there, in that order, from those of o and of the end states."""
    inputs = ScanInputs(
        q, k, v, lr, momentum, decay, scale, norm_weight, norm_bias, weights, anchor, momentum_state, projection
    )
    with torch.cuda.device_of(q):
        return _Backward(inputs, kept, grad_o.contiguous(), grad_ends, segments, Plan(*plan)).run()


# States that are written down: matrices in the dtype of the inputs, and the biases there are in float32.
_Trace = tuple[Tensor, Tensor | None]


class _Backward:
    """One call of the backward operator."""

    def __init__(
        self, inputs: ScanInputs, kept: list[Tensor], grad_o: Tensor, grad_ends: list[Tensor], segments: Tensor,
        plan: Plan,
    ):  # fmt: skip
        self.inputs, self.plan, self.grad_o, self.segments = inputs, plan, grad_o, segments
        self.S, self.H, self.D = segments.shape[0], *inputs.q.shape[1:]
        self.grid = (self.S, self.H)
        momentum = ["momentum"] if inputs.momentum is not None else []
        self.kept = dict(zip(["weights", *momentum], kept, strict=True))
        self.gradients = Gradients(inputs, grad_o, grad_ends, segments)

    def run(self) -> list[Tensor]:
        x, plan = self.inputs, self.plan
        out, carried = self.gradients.out, self.gradients.carried
        trace = self._trace()
        queries = _project(x, self.segments, plan, None) if plan.projection else x.q
        grad_x = out["q"]
        if plan.projection:  # no result yet: in the range of float32, as the operands of gradients
            grad_x = torch.empty_like(x.q, dtype=gradient_dtype(x.q.dtype))
        for group in reversed(range(plan.groups)):
            self._recompute(group, trace)
            self._backward(group, queries, trace, grad_x, out, carried)
        if plan.projection:
            self._projection_backward(grad_x, out, carried["projection"])
        return self.gradients.finish()

    def _trace(self) -> dict[str, _Trace | None]:
        """Room for what recompute.py writes for one group."""
        x, plan = self.inputs, self.plan
        tiles = plan.interval * plan.tiles
        return {
            "weights": self._room(tiles),
            "momentum": self._room(tiles) if x.momentum is not None else None,
            "anchor": self._room(plan.interval) if plan.multi else None,
        }

    def _room(self, states: int) -> _Trace:
        x, rows = self.inputs, (states, self.S, self.H)
        matrices = self.D * self.plan.hidden * (1 + self.plan.is_mlp)
        biases = x.weights.shape[-1] - matrices
        return x.q.new_empty(*rows, matrices), x.weights.new_empty(*rows, biases) if biases else None

    def _recompute(self, group: int, trace: dict[str, _Trace | None]) -> None:
        x, plan = self.inputs, self.plan
        if group == 0:
            start = (x.weights, x.anchor, x.momentum_state)
        else:
            kept = {name: t[group - 1] for name, t in self.kept.items()}
            start = (kept["weights"], None, kept.get("momentum"))
        recompute_kernel[self.grid](
            x.k, x.v, x.lr, x.momentum, x.decay, x.scale, x.norm_weight, x.norm_bias, self.segments, *start,
            trace["weights"], trace["momentum"], trace["anchor"], group, plan.interval, self.S,
            **_sizes(x, plan), FROM_KEPT=group > 0, **_launch(plan.recompute_warps, plan.backward_stages),
        )  # fmt: skip

    def _backward(
        self, group: int, queries: Tensor, trace: dict[str, _Trace | None], grad_x: Tensor, out: dict[str, Tensor],
        carried: dict[str, Tensor],
    ) -> None:  # fmt: skip
        x, plan = self.inputs, self.plan
        backward_kernel[self.grid](
            queries, x.k, x.v, x.lr, x.momentum, x.decay, x.scale, x.norm_weight, x.norm_bias, self.segments,
            trace["weights"], trace["momentum"], trace["anchor"], self.grad_o, grad_x, out["k"], out["v"], out["lr"],
            out.get("momentum"), out.get("decay"), out.get("scale"), out.get("norm_weight"),
            carried["weights"], carried["anchor"], carried.get("momentum"), group, plan.interval, self.S,
            **_sizes(x, plan), **_launch(plan.backward_warps, plan.backward_stages),
        )  # fmt: skip

    def _projection_backward(self, grad_x: Tensor, out: dict[str, Tensor], carried: Tensor) -> None:
        x, plan = self.inputs, self.plan
        sizes = _projection_sizes(x, plan)
        projection_queries_kernel[self.grid](
            x.q, x.k, self.segments, x.projection, grad_x, out["q"], **sizes, NORMALIZE=bool(plan.normalize)
        )
        projection_keys_kernel[self.grid](x.q, x.k, self.segments, grad_x, out["k"], carried, **sizes)


differentiate(fused_forward, "fused_backward")
