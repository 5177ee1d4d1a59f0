"""Every check of the arguments of the memory operations, in one place.

A backend receives a `MemoryProblem` that has passed them and checks nothing again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .memories.kind import MemoryKind, Stage
from .memories.kinds import memory_kind, type_of
from .transfer import to_host
from .types import MemoryGates, MemoryOptions, MemoryParams, MemoryState, is_of

QK_PROJECTIONS = ("shard", "chunk", "none")
UPDATES = ("gradient", "muon")


class MemoryProblem(NamedTuple):
    """The arguments of one call; see `local_memory` for their meaning. Once checked, cu_seqlens is in the host's
    memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: MemoryGates
    params: MemoryParams
    options: MemoryOptions
    token_scale: Tensor | None = None
    cu_seqlens: Tensor | None = None
    initial_state: MemoryState | None = None

    @property
    def kind(self) -> MemoryKind:
        return memory_kind(type_of(self.options.memory_type, self.params.fast_weights))

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.kind.stages(len(self.params.fast_weights.maps))

    @property
    def rows(self) -> int:
        """Number of independent sequences: the batch size, or the number of packed sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def needs_grad(self) -> bool:
        """Whether a backward may follow."""
        tensors = [self.q, self.k, self.v, *self.gates, *self.params, self.token_scale]
        if self.initial_state is not None:
            tensors += self.initial_state.tensors().values()
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_not_traced() -> None:
    """torch.jit.trace would end in an internal assertion and the request to report it to PyTorch: our operators take
    lists of tensors, and the reference backend differentiates."""
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace, and torch.onnx.export with dynamo=False, which uses it, cannot record a memory that is "
            'trained while it reads; use torch.export.export(model, (input_ids,), {"use_cache": False}, strict=False)'
        )


def check(problem: MemoryProblem) -> MemoryProblem:
    """Check a call of a memory operation. Raises ValueError or TypeError that names the argument, the rule and the
    remedy."""
    check_not_traced()
    p, options = problem, problem.options
    if options.update not in UPDATES:
        raise ValueError(f"update={options.update!r} is unknown; use one of {UPDATES}")
    if options.is_global:
        _check_nothing_local(p)
    elif options.update != "gradient":
        raise ValueError(f'a local memory learns by update="gradient" alone, got {options.update!r}; leave it out')
    _check_tensors(p)
    _check_params(p)
    _check_lengths(options)
    if options.qk_projection not in QK_PROJECTIONS:
        raise ValueError(f"qk_projection={options.qk_projection!r} is unknown; use one of {QK_PROJECTIONS}")
    if not isinstance(options.normalize_projection, bool):
        raise TypeError(f"normalize_projection must be a bool, got {type(options.normalize_projection).__name__}")
    if options.normalize_projection and options.qk_projection == "none":
        raise ValueError('normalize_projection=True needs a projection; use qk_projection="shard" or "chunk", or False')
    if p.token_scale is not None:
        if p.gates.momentum is not None or p.gates.decay is not None:
            raise ValueError("token_scale excludes momentum and decay; pass one or the other")
        _expect("token_scale", p.token_scale, (options.chunk_size,), p.q, "[chunk_size]", same_dtype=False)
    if p.cu_seqlens is not None:
        p = p._replace(cu_seqlens=_host_boundaries(p))
    _check_state(p)
    return p


def _check_nothing_local(p: MemoryProblem) -> None:
    """The options that only a local memory has, of a global one."""
    for name in ("shard_length", "qk_projection", "normalize_projection"):
        value = getattr(p.options, name)
        if value != MemoryOptions._field_defaults[name]:
            raise ValueError(f"a global memory has no {name}, got {value!r:.80}; leave it at its default")
    if p.token_scale is not None:
        raise ValueError(f"a global memory has no token_scale, got {p.token_scale!r:.80}; leave it at its default")


def _expect(name: str, x: object, shape: tuple[int, ...], like: Tensor, layout: str, same_dtype: bool) -> None:
    """Check one tensor's type, shape, device, and that its dtype is floating (or that of `like`)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {layout} = {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but q is on {like.device}; move it with .to({str(like.device)!r})")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if same_dtype and x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of q, {like.dtype}, got {x.dtype}; cast it with .to(q.dtype)")


def _check_tensors(p: MemoryProblem) -> None:
    if not isinstance(p.q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(p.q).__name__}")
    if p.q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {tuple(p.q.shape)}")
    B, T, H, D = p.q.shape
    if min(B, T, H, D) < 1:
        raise ValueError(
            f"q must not be empty, got [B, T, H, D] = {(B, T, H, D)}; skip the call when there is no token"
        )
    for name in ("q", "k", "v"):
        _expect(name, getattr(p, name), (B, T, H, D), p.q, "[B, T, H, D]", same_dtype=True)
    for name, gate in p.gates._asdict().items():
        if name == "lr" or gate is not None:
            _expect(name, gate, (B, T, H), p.q, "[B, T, H]", same_dtype=False)


def _check_params(p: MemoryProblem) -> None:
    params, (H, D) = p.params, p.q.shape[2:]
    if not isinstance(params, MemoryParams):
        raise TypeError(f"params must be a MemoryParams, got {type(params).__name__}")
    if not isinstance(params.w1, Tensor) or params.w1.dim() != 3:
        raise ValueError("params.w1 must be a tensor of shape [H, D, M]")
    weights, M = params.fast_weights, params.w1.shape[-1]
    there = [w is not None for w in weights[::2]]
    for n, bias in enumerate(weights[1::2], start=1):
        if bias is not None and not there[n - 1]:
            raise ValueError(f"params.b{n} is the bias of w{n}, which is not given; leave it out, or give both")
    if there != sorted(there, reverse=True):
        raise ValueError(f"params.w{there.index(False) + 1} is missing before others; number the weights from w1 on")
    shapes = p.kind.shapes(D, M, len(weights.maps))
    if len(shapes) == 1 and M != D:
        raise ValueError(f"a linear memory (w2=None) needs params.w1 of shape [H, D, D], got M={M} and D={D}")
    letter = {M: "M", D: "D"}
    for n, ((inputs, outputs), (w, b)) in enumerate(zip(shapes, weights.maps, strict=True), start=1):
        layout = f"[H, {letter[inputs]}, {letter[outputs]}]"
        _expect(f"params.w{n}", w, (H, inputs, outputs), p.q, layout, same_dtype=False)
        if b is not None:
            _expect(f"params.b{n}", b, (H, outputs), p.q, f"[H, {letter[outputs]}]", same_dtype=False)
    if (params.norm_weight is None) != (params.norm_bias is None):
        raise ValueError("params.norm_weight and params.norm_bias come together: pass both or neither")
    if params.norm_weight is not None:
        for name, x in zip(("norm_weight", "norm_bias"), params.norm, strict=True):
            _expect(f"params.{name}", x, (H, D), p.q, "[H, D]", same_dtype=False)


def _check_lengths(options: MemoryOptions) -> None:
    for name in ("chunk_size", "shard_length"):
        n = getattr(options, name)
        if name == "shard_length" and n is None:
            continue
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} must be an int, got {type(n).__name__}")
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
    if options.shard_length is not None and options.shard_length % options.chunk_size:
        near = max(1, options.shard_length // options.chunk_size) * options.chunk_size
        raise ValueError(
            f"chunk_size={options.chunk_size} must divide shard_length={options.shard_length}; use shard_length={near} "
            "or None"
        )


def _host_boundaries(p: MemoryProblem) -> Tensor:
    """cu_seqlens, checked, where the host can read it again and again; on a device it is waited for once."""
    cu = p.cu_seqlens
    if not isinstance(cu, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu).__name__}")
    if cu.dim() != 1 or cu.shape[0] < 2 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be a [N + 1] tensor of int32 or int64, got {tuple(cu.shape)} {cu.dtype}")
    B, T = p.q.shape[:2]
    if B != 1:
        raise ValueError(
            f"cu_seqlens needs all sequences packed into one row (B = 1), got B={B}; reshape to [1, B·T, …]"
        )
    (cu,) = to_host(cu)
    ends = cu.tolist()
    if ends[0] != 0 or ends[-1] != T or any(b < a for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to T={T}, got {ends if len(ends) < 20 else ends[:20] + ['…']}")
    return cu


def _check_state(p: MemoryProblem) -> None:
    state = p.initial_state
    if state is None:
        return
    if not is_of(state, MemoryState):
        raise TypeError(f"initial_state must be a MemoryState, got {type(state).__name__}")
    N, (H, D) = p.rows, p.q.shape[2:]
    for group in ("weights", "anchor", "momentum"):
        weights = getattr(state, group)
        if weights is None:
            continue
        for name, want in p.params.fast_weights._asdict().items():
            x = getattr(weights, name)
            if (want is None) != (x is None):
                raise ValueError(f"initial_state.{group}.{name} does not match params.{name}: one is None, one is not")
            if x is not None:
                _expect(f"initial_state.{group}.{name}", x, (N, *want.shape), p.q, "[rows, *params]", same_dtype=False)
    if (state.momentum is None) != (p.gates.momentum is None):
        raise ValueError("initial_state.momentum and momentum must both be given or both be None")
    if (state.projection is None) != (p.options.qk_projection == "none"):
        raise ValueError(f"initial_state.projection does not fit qk_projection={p.options.qk_projection!r}")
    if state.projection is not None:
        _expect("initial_state.projection", state.projection, (N, H, D, D), p.q, "[rows, H, D, D]", same_dtype=False)
    if not isinstance(state.position, Tensor) or state.position.dtype != torch.int64 or state.position.shape != (N,):
        raise ValueError(f"initial_state.position must be an int64 tensor of shape [rows] = ({N},)")
