"""What the optimizer is told: which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .plan import Stage


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: the matrices of linear layers decay; everything else does not.

    What does not decay: embeddings (and an output head tied to them), norms, biases, convolutions, the linear maps of
    the step size, momentum and forget gates, and the memories' learned initial states: those are where the inner
    optimisation starts, and their scale sets the size of its first gradients. Frozen parameters are in no group.
    """
    decayed = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings and not name.endswith("_gate"):
            decayed[id(module.weight)] = module.weight
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in decayed]
    groups = [
        {"params": [p for p in decayed.values() if p.requires_grad], "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_at(stage: Stage, step: int) -> float:
    """The learning rate of `step`, counted from 0: a linear rise that ends at the peak, then the stage's schedule.

    cosine     `final + (1 − final) · ½(1 + cos πx)` of the peak, x the share of the steps after the warm-up.
    wsd        the peak, then a straight line to `final` over the last `decay_share` of the steps.
    constant   the peak.
    """
    return stage.learning_rate * _factor(stage, step)


def _factor(stage: Stage, step: int) -> float:
    warmup = math.ceil(stage.warmup_share * stage.steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "wsd":
        decay = max(1, round(stage.decay_share * stage.steps))
        fallen = max(0.0, min(1.0, (step + 1 - (stage.steps - decay)) / decay))
        return 1.0 - (1.0 - stage.final_share) * fallen
    progress = min(1.0, (step - warmup + 1) / max(1, stage.steps - warmup))
    return stage.final_share + (1 - stage.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
