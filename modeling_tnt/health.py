"""Numbers that show how the inner loop of a model is doing: step sizes, inner gradients, how far fast weights move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import FastWeights, MemoryParams, MemoryState
from .memory_layer import TNTMemory
from .modeling import TNTPreTrainedModel


@torch.no_grad()
def memory_health(model: TNTPreTrainedModel, input_ids: Tensor) -> dict[str, float]:
    """Read input_ids [B, T] without gradient and report on every memory, under "layer0/global/…", "layer0/local0/…".

    step_size        mean of the step size η(x) over tokens and heads.
    inner_loss       mean of `½‖f(W_init, k) − v‖²` over tokens and heads: what a memory that learns nothing would have.
    inner_grad_norm  mean over tokens and heads of the norm of that loss's gradient with respect to the fast weights.
    state_norm       ‖W_T‖ / ‖W_init‖, mean over rows; 1 when nothing was learned, not finite when the loop diverged.

    A small batch will do: each memory layer's input is recorded in one forward pass, the rest is per token.
    """
    base = getattr(model, model.base_model_prefix, model)
    inputs: dict[int, Tensor] = {}

    def record(index: int):
        return lambda _module, args: inputs.__setitem__(index, args[0])

    hooks = [layer.memory.register_forward_pre_hook(record(i)) for i, layer in enumerate(base.layers)]
    was_training = model.training
    try:
        cache = model.eval()(input_ids=input_ids, use_cache=True, return_dict=True).past_key_values
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    report = {}
    for i, layer in enumerate(base.layers):
        _, k, v, _ = layer.memory.project(inputs[i])
        for name, memory in layer.memory.memories().items():
            loss, grad_norm = _inner_loss(memory, k.float(), v.float())
            report |= {
                f"layer{i}/{name}/step_size": memory.gates(inputs[i]).lr.mean().item(),
                f"layer{i}/{name}/inner_loss": loss.mean().item(),
                f"layer{i}/{name}/inner_grad_norm": grad_norm.mean().item(),
                f"layer{i}/{name}/state_norm": _state_norm(memory, cache.layers[i].memories[name]),
            }
    return report


def _state_norm(memory: TNTMemory, state: MemoryState) -> float:
    def norm(weights: FastWeights, first_dim: int) -> Tensor:
        return sum(t.float().square().flatten(first_dim).sum(-1) for t in weights if t is not None).sqrt()

    return (norm(state.weights, 1) / norm(memory.params.fast_weights, 0)).mean().item()


def _inner_loss(memory: TNTMemory, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Inner loss and gradient norm at W_init of every token and head, [B, T, H] each; k, v [B, T, H, D].

    The gradient of a layer's weights is the outer product of its input a and its output's gradient δ (and δ itself for
    the bias), so its squared norm is (‖a‖² + 1)‖δ‖².
    """
    p = MemoryParams(*(None if t is None else t.detach().float() for t in memory.params))
    with torch.enable_grad():
        x, layers = k.requires_grad_(), []
        for weight, bias in ((p.w1, p.b1), (p.w2, p.b2)):
            if weight is not None:
                x = F.gelu(x, approximate="tanh") if layers else x
                y = torch.einsum("bthd,hdm->bthm", x, weight)
                y = y if bias is None else y + bias
                layers.append((x, y, bias is not None))
                x = y
        if p.norm_weight is not None:
            x = k + F.layer_norm(x, x.shape[-1:], eps=1e-6) * p.norm_weight + p.norm_bias
        loss = 0.5 * (x - v).square().sum(-1)
        deltas = torch.autograd.grad(loss.sum(), [y for _, y, _ in layers])
    squares = sum(
        (a.square().sum(-1) + has_bias) * delta.square().sum(-1)
        for (a, _, has_bias), delta in zip(layers, deltas, strict=True)
    )
    return loss.detach(), squares.detach().sqrt()
