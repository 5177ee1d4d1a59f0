"""What backends share that read segments by an operator of their own: the operator's tensors, and its autograd.

Such an operator walks each segment (segments.Segment) of each head with its state at hand, in both directions. Its
arguments are the tensors of `ScanInputs`, the table of segments and a plan, a list of ints that only the backend knows.
It returns o, the end states (`EndState`, those that there are), and the states that it keeps for its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .checks import MemoryProblem
from .operators import OPERATORS
from .torch_backend.segments import final_positions
from .types import FastWeights, MemoryParams, MemoryState


class ScanInputs(NamedTuple):
    """The tensors of a call; None where the memory does without.

    q, k, v              [tokens, H, D], contiguous, of one dtype
    lr, momentum, decay  [tokens, H] float32
    scale                [C] float32
    norm_*               [H, D] float32
    weights, anchor, momentum_state   [rows, H, P] float32: packed start states, row 0 the learned one
    projection           [rows, H, D, D] float32
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    scale: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weights: Tensor
    anchor: Tensor | None
    momentum_state: Tensor | None
    projection: Tensor | None

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self)


class EndState(NamedTuple):
    """The packed state after the last token of each sequence: like the start states, with a row for each."""

    weights: Tensor
    anchor: Tensor
    momentum: Tensor | None
    projection: Tensor | None

    @classmethod
    def from_outputs(cls, outputs: list[Tensor], inputs: ScanInputs) -> EndState:
        """The first outputs of the operator behind o."""
        weights, anchor, *rest = outputs
        momentum = rest.pop(0) if inputs.momentum is not None else None
        return cls(weights, anchor, momentum, rest.pop(0) if inputs.projection is not None else None)


def scan_inputs(
    p: MemoryProblem, params: MemoryParams, keeps_anchor: bool, pack: Callable[[FastWeights], Tensor]
) -> ScanInputs:
    """The tensors of a call. Row 0 of every start state is the learned one, row 1 + n that of sequence n.

    params: in float32. keeps_anchor: whether a segment may stand apart from its anchor. pack: to [N, H, P] float32.
    """

    def scalars(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float().flatten(0, 1).contiguous()

    def rows(first: Tensor, others: Tensor | None) -> Tensor:
        return first if others is None else torch.cat([first, others.float()])

    H, D = p.q.shape[2:]
    state = p.initial_state
    weights = pack(params.fast_weights.map(lambda t: t.unsqueeze(0)))
    anchor = weights
    momentum = torch.zeros_like(weights) if p.gates.momentum is not None else None
    projection = weights.new_zeros(1, H, D, D) if p.options.qk_projection != "none" else None
    if state is not None:
        weights, anchor = rows(weights, pack(state.weights)), rows(weights, pack(state.anchor))
        momentum = None if momentum is None else rows(momentum, pack(state.momentum))
        projection = None if projection is None else rows(projection, state.projection)
    return ScanInputs(
        *(t.flatten(0, 1).contiguous() for t in (p.q, p.k, p.v)), *map(scalars, p.gates),
        None if p.token_scale is None else p.token_scale.float().contiguous(),
        *(None if t is None else t.contiguous() for t in params.norm),
        weights, anchor if keeps_anchor else None, momentum, projection,
    )  # fmt: skip


def final_state(p: MemoryProblem, end: EndState, unpack: Callable[[Tensor], FastWeights]) -> MemoryState:
    momentum = None if end.momentum is None else unpack(end.momentum)
    return MemoryState(unpack(end.weights), unpack(end.anchor), momentum, end.projection, final_positions(p))


class Gradients:
    """The gradients of one call: a backend's backward kernels write into `out` and `carried`.

    out      by the names of `ScanInputs`, like these: q, k, v, lr, momentum, decay; scale [S, H, C] and norm_weight
             [S, H, D], of each segment by itself.
    carried  weights, anchor, momentum, projection: gradients of the states after each segment, [S, …] float32, which
             the kernels turn into those of the states before it.
    """

    def __init__(self, inputs: ScanInputs, grad_o: Tensor, grad_ends: list[Tensor], segments: Tensor) -> None:
        self.inputs, self.grad_o, self.segments = inputs, grad_o, segments
        x, (S, H, D) = inputs, (segments.shape[0], *inputs.q.shape[1:])
        names = ["weights", "anchor", *(n for n in ("momentum", "projection") if getattr(x, n) is not None)]
        self.carried = {name: self._carry(grad) for name, grad in zip(names, grad_ends, strict=True)}
        tokens = (name for name in ("q", "k", "v", "lr", "momentum", "decay") if getattr(x, name) is not None)
        self.out: dict[str, Tensor] = {name: torch.empty_like(getattr(x, name)) for name in tokens}
        if x.scale is not None:
            self.out["scale"] = x.lr.new_zeros(S, H, x.scale.shape[0])
        if x.norm_weight is not None:
            self.out["norm_weight"] = x.lr.new_zeros(S, H, D)

    def _carry(self, grad_end: Tensor) -> Tensor:
        """[ends, …] -> [S, …], zero where a segment ends no sequence."""
        if not grad_end.shape[0]:
            return grad_end.new_zeros(self.segments.shape[0], *grad_end.shape[1:])
        ends = self.segments[:, 4]
        return torch.where(_column(ends >= 0, grad_end), grad_end.index_select(0, ends.clamp(min=0)), 0.0)

    def finish(self) -> list[Tensor]:
        """The operator's results, once the kernels have run: sums over segments, in the order of `ScanInputs`."""
        x, out = self.inputs, self.out
        if x.scale is not None:
            out["scale"] = out["scale"].sum((0, 1))
        if x.norm_weight is not None:
            out["norm_weight"] = out["norm_weight"].sum(0)
            # z = … + bias reaches the loss through o and, with the opposite sign of v, through the error.
            out["norm_bias"] = self.grad_o.sum(0, dtype=torch.float32) - out["v"].sum(0, dtype=torch.float32)
        out["weights"] = self._start(self.carried["weights"], x.weights)
        if x.anchor is not None:
            # Only a segment that begins in mid-chunk has an anchor of its own before it.
            grad = self.carried["anchor"]
            out["anchor"] = self._start(torch.where(_column(self.segments[:, 2] > 0, grad), grad, 0.0), x.anchor)
        if x.momentum_state is not None:
            out["momentum_state"] = self._start(self.carried["momentum"], x.momentum_state)
        if x.projection is not None:
            out["projection"] = self._start(self.carried["projection"], x.projection)
        return [out[name] for name in ScanInputs._fields if out.get(name) is not None]

    def _start(self, grad: Tensor, like: Tensor) -> Tensor:
        """[S, …] -> [rows, …]. Row 0 starts many segments, every other row at most one."""
        if like.shape[0] == 1:
            return grad.sum(0, keepdim=True)
        sources = self.segments[:, 3]
        fresh = _column(sources == 0, grad)
        start = torch.zeros_like(like).index_copy_(0, sources, torch.where(fresh, 0.0, grad))
        start[0] = torch.where(fresh, grad, 0.0).sum(0)
        return start


def _column(of_segments: Tensor, like: Tensor) -> Tensor:
    """[S] -> [S, 1, …], with as many dimensions as `like`."""
    return of_segments.view(-1, *[1] * (like.dim() - 1))


def gradients_like_inputs(*arguments) -> list[Tensor]:
    """What a backward operator returns for tensors without data."""
    return [torch.empty_like(t) for t in arguments[: len(ScanInputs._fields)] if t is not None]


def differentiate(forward: CustomOpDef, backward: str) -> None:
    """Give an operator its backward: the operator of this name, which takes the tensors of `ScanInputs`, the kept
    states, the gradients of o and of the end states, segments and plan, and returns `Gradients.finish`."""

    def setup_context(ctx, inputs, output) -> None:
        *tensors, segments, ctx.plan = inputs
        x = ScanInputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.ends = 2 + (x.momentum is not None) + (x.projection is not None)
        ctx.save_for_backward(*tensors, segments, *output[1 + ctx.ends :])
        ctx.end_shapes = [t.shape for t in output[1 : 1 + ctx.ends]]

    def autograd_backward(ctx, grads):
        saved = ctx.saved_tensors
        count = len(ScanInputs._fields)
        tensors, segments, kept = saved[:count], saved[count], list(saved[count + 1 :])
        q = tensors[0]
        grad_o = torch.zeros_like(q) if grads[0] is None else grads[0].contiguous()
        grad_ends = [
            torch.zeros(shape, device=q.device) if g is None else g.contiguous()
            for g, shape in zip(grads[1 : 1 + ctx.ends], ctx.end_shapes, strict=True)
        ]
        result = iter(getattr(OPERATORS, backward)(*tensors, kept, grad_o, grad_ends, segments, ctx.plan))
        return *(None if t is None else next(result) for t in tensors), None, None

    forward.register_autograd(autograd_backward, setup_context=setup_context)
