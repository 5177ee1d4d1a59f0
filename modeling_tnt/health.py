"""Diagnostics of the inner loop: step sizes, inner gradients, losses, and how far the fast weights move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compat import cache_of
from .kernels import FastWeights, MemoryParams, MemoryState
from .kernels.api import read
from .kernels.checks import MemoryProblem
from .kernels.memories.kind import MemoryKind
from .kernels.memories.kinds import memory_kind
from .kernels.torch_backend.chunk import Norm, chunk_gradients
from .kernels.types import MemoryOptions
from .memory_layer import MemoryInputs, TNTMemoryLayer
from .modeling import TNTPreTrainedModel


@torch.no_grad()
def memory_health(model: TNTPreTrainedModel, input_ids: Tensor) -> dict[str, float]:
    """Read input_ids [B, T] without gradient and report on every memory, under "layer0/global/…", "layer0/local0/…".

    step_size        mean of the step size η(x) over tokens and heads.
    inner_loss       mean of `½‖f(W_init, k) − v‖²` over tokens and heads: what a memory that learns nothing would have.
    inner_grad_norm  mean over tokens and heads of the norm of that loss's gradient with respect to the fast weights.
    loss_before      mean of `½‖f(W, k) − v‖²` over the tokens of the last chunk (the last tokens, as many as a chunk
                     has), W being the weights before the first of them.
    loss_after       the same with the weights after the last of them: below loss_before where the update helps.
    state_norm       ‖W_T‖ / ‖W_init‖, mean over rows; 1 when nothing was learned, not finite when the loop diverged.

    A small batch will do: each memory layer's input is recorded in one forward pass, and all but the tokens of the last
    chunk are read once more.
    """
    layers = model.memory_layers()
    inputs: dict[int, list[Tensor]] = {i: [] for i in layers}

    def record(index: int, mix: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recording(x: Tensor, *args: Any) -> Tensor:
            inputs[index].append(x)
            return mix(x, *args)

        return recording

    was_training = model.training
    for i, layer in layers.items():  # not by hooks: a gate of attention has a layer's `mix` alone
        layer.mix = record(i, layer.mix)
    try:
        cache = cache_of(model.eval()(input_ids=input_ids, use_cache=True, return_dict=True))
    finally:
        model.train(was_training)
        for layer in layers.values():
            del layer.mix

    report = {}
    for i, layer in layers.items():
        states, x = cache.layers[i].memories, torch.cat(inputs[i], dim=1)  # segment by segment, as a context
        for name, memory, options in layer.operations():
            memory_inputs = memory(x, options.chunk_size)
            values = _look_at_memory(layer, memory_inputs, options, x, states[name])
            report |= {f"layer{i}/{name}/{quantity}": value for quantity, value in values.items()}
    return report


def _look_at_memory(
    layer: TNTMemoryLayer, inputs: MemoryInputs, options: MemoryOptions, x: Tensor, state: MemoryState
) -> dict[str, float]:
    """What `memory_health` reports of one memory, which has read x [B, T, hidden_size] and is now in `state`."""
    q, k, v, _ = layer.project(x)
    rows, length = x.shape[:2]
    params, gates, kind = inputs.params, inputs.gates(), memory_kind(options.memory_type)
    initial = params.fast_weights.map(lambda t: t.expand(rows, *t.shape))
    loss, grad_norm = _inner_loss(kind, params, initial, k, v)
    begin = max(0, length - options.chunk_size)
    before = initial
    if begin > 0 and not (options.shard_length and begin % options.shard_length == 0):
        first = gates.map(lambda gate: gate[:, :begin])
        read_before = (t[:, :begin] for t in (q, k, v))
        problem = MemoryProblem(*read_before, first, params, options, inputs.token_scale)
        before = read(problem, output_final_state=True, backend="auto")[1].weights
    last_k, last_v = k[:, begin:], v[:, begin:]
    return {
        "step_size": gates.lr.mean().item(),
        "inner_loss": loss.mean().item(),
        "inner_grad_norm": grad_norm.mean().item(),
        "loss_before": _inner_loss(kind, params, before, last_k, last_v)[0].mean().item(),
        "loss_after": _inner_loss(kind, params, state.weights, last_k, last_v)[0].mean().item(),
        "state_norm": (_norm(state.weights) / _norm(initial)).mean().item(),
    }


def _norm(weights: FastWeights) -> Tensor:
    """The norm over all fast weights of a row, [B]."""
    return sum(t.float().square().flatten(1).sum(-1) for t in weights if t is not None).sqrt()


def _inner_loss(
    kind: MemoryKind, params: MemoryParams, weights: FastWeights, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Inner loss and gradient norm at `weights` (with a leading batch dimension) of every token and head, [B, T, H]
    each; k, v [B, T, H, D].

    The gradient of a map's weights is the outer product of its input a and its output's gradient δ (and δ itself for
    the bias), so its squared norm is (‖a‖² + 1)‖δ‖².
    """
    B, T, H, _ = k.shape

    def rows(t: Tensor) -> Tensor:
        return t.detach().float().transpose(1, 2).flatten(0, 1)

    w = weights.map(lambda t: t.detach().float().flatten(0, 1))
    norm = None
    if params.norm_weight is not None:
        norm = Norm(*(t.detach().float().repeat(B, 1).unsqueeze(1) for t in params.norm))
    stages = kind.stages(len(w.maps))
    _, keys = chunk_gradients(stages, w, rows(k), rows(v), torch.ones_like(rows(k)[..., :1]), norm)
    squares = sum(
        (a.square().sum(-1) + (w.b1 is not None)) * keys.deltas[i].square().sum(-1)
        for stage, a in zip(stages, keys.inputs, strict=True)
        for i in stage.maps
    )
    loss = 0.5 * keys.error.square().sum(-1)
    return tuple(t.unflatten(0, (B, H)).transpose(1, 2) for t in (loss, squares.sqrt()))
