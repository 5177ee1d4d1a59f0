"""The optimizer's parameter groups, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from modeling_tnt.registration import decaying_parameters

from ..plan import Stage

FUSED_DEVICES = ("cpu", "cuda")
"""Types of devices on which torch's AdamW takes one step for all parameters: for the 86 tensors of `tiny` 6 operator
calls instead of 800."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: what decays, see `decaying_parameters`, and what does not. Frozen parameters are in no group."""
    decaying = decaying_parameters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decaying], "weight_decay": 0.0},
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
