"""A block: what mixes the tokens, and the feed-forward network behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import AttentionPlan, TNTAttention
from .cache import LAYER_TYPE, TNTCacheLayer
from .configuration import TNTConfig
from .context_relay import Relay
from .memory_as_context import MemoryAsContext
from .memory_layer import TNTMemoryLayer
from .packing import Packing, TokenStep


class TNTMLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) · up(x))`."""

    def __init__(self, config: TNTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TNTBlock(GradientCheckpointingLayer):
    """RMSNorm → memories, attention or both → residual, RMSNorm → SwiGLU → residual."""

    def __init__(self, config: TNTConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_memory = config.layer_types[layer_idx] == LAYER_TYPE
        self.memory_as = config.memory_as if self.has_memory else None
        if self.has_memory:
            self.memory = TNTMemoryLayer(config)
        if not self.has_memory or self.memory_as is not None:
            self.self_attn = TNTAttention(config, layer_idx, projects_out=self.memory_as != "gate")
        inner = config.num_heads * config.head_dim
        if self.memory_as == "context":
            self.as_context = MemoryAsContext(config)
        elif self.memory_as is not None:
            self.memory_norm = nn.RMSNorm(
                config.hidden_size if self.memory_as == "layer" else inner, eps=config.rms_norm_eps
            )
        if self.memory_as == "gate":
            self.attention_norm = nn.RMSNorm(inner, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TNTMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        packing: Packing | None = None,
        cache_layer: TNTCacheLayer | None = None,
        update_cache: bool = False,
        step: TokenStep | None = None,
        relay: Relay | None = None,
        attention: AttentionPlan | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] → the same shape; see `TNTMemoryLayer.forward` and `TNTAttention.forward`."""
        x = self.input_norm(hidden_states)
        read = (packing, cache_layer, update_cache, step, relay)
        if self.memory_as == "layer":
            # Titans' MAL: y = M(x), o = SWA(y); the norm between the two is ours.
            mixed = self.self_attn(self.memory_norm(self.memory(x, *read)), attention)
        elif self.memory_as == "gate":
            # Titans' MAG: o = SWA(x) ⊗ M(x), where ⊗ norms each by learned weights. The paper leaves its
            # non-linearity open: here a sigmoid of what the memories say gates the attention.
            y, m = self.attention_norm(self.self_attn(x, attention)), self.memory_norm(self.memory.mix(x, *read))
            mixed = self.memory.o_proj(y * torch.sigmoid(m))
        elif self.memory_as == "context":
            mixed = self.as_context(x, self.memory, self.self_attn, attention.turn, *read[:-1])
        else:
            mixed = self.memory(x, *read) if self.has_memory else self.self_attn(x, attention)
        tokens = step or packing
        if attention is not None and tokens is not None:
            # A query at padding sees nothing, and what comes out may be no number.
            mixed = tokens.hide(mixed)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))
