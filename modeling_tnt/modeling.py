"""`TNTModel` and `TNTForCausalLM`: transformers models whose token mixer is a set of memories trained while reading."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from . import registration  # noqa: F401  its import tells transformers and PEFT of these models
from .attention import TNTRotaryEmbedding, plan_attention, reading_copy
from .block import TNTBlock
from .cache import check_cache, check_mask, memory_cache_layers
from .compat import OTHER_NAME, BaseModelOutputWithPast, CausalLMOutputWithPast, cache_of, named_cache, one_cache
from .configuration import TNTConfig
from .context_parallel import ContextParallel, ContextParallelMixin
from .convolution import ShortConvolution
from .generation import TNTGenerationMixin, warn_no_cache_when_checkpointing
from .hub_export import HubExportMixin
from .kernels.checks import check_not_traced
from .kernels.memories.kinds import memory_kind
from .memorize import MemorizeMixin
from .memory_layer import TNTGate, TNTMemory, TNTMemoryLayer, step_options
from .packing import Packing, plan_packing, plan_step


class TNTPreTrainedModel(HubExportMixin, MemorizeMixin, ContextParallelMixin, PreTrainedModel):
    """Base class of the models: saving, initialisation, and settings for transformers."""

    config: TNTConfig
    config_class = TNTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TNTBlock"]
    _skip_keys_device_placement = ["cache", OTHER_NAME]
    _is_stateful = True
    _supports_attention_backend = True

    @property
    def _supports_attention(self) -> bool:
        """Memories alone run no implementation of attention, and the Trainer cuts rows for ring attention by it."""
        return self.config.has_attention

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention

    def memory_layers(self) -> dict[int, TNTMemoryLayer]:
        """The layers with memories, by the index of their block."""
        return {i: block.memory for i, block in enumerate(self.base_model.layers) if block.has_memory}

    def set_local_chunks(
        self, chunk_sizes: Sequence[int], shard_lengths: int | Sequence[int | None] | None = None
    ) -> None:
        """Give the local memories other chunk sizes, as TNT's second stage does (arXiv 2511.07343).

        No weight changes. `config.local_chunk_sizes` does, and `config.local_shard_lengths` if it is given: the layers
        read them at each call, and the next `save_pretrained` saves them. A cache that was filled before the swap
        cannot be read on; the next call with it raises a ValueError that names the chunks.

        Args:
            chunk_sizes: tokens between two updates, one int of at least 1 for each local memory.
            shard_lengths: tokens after which a memory is reset to its learned initial state, a multiple of its chunk
                size: one int for all, or one entry for each, in which None stands for "never", as in [None]. None
                alone keeps what the config has.

        Raises:
            ValueError: one that lists what is wrong with the two together; the config is unchanged then.
        """
        checked = self._with_local_chunks(chunk_sizes, shard_lengths)
        # Lists of our own: the caller's may change later.
        for name in ("local_chunk_sizes", "local_shard_lengths"):
            setattr(self.config, name, copy.copy(getattr(checked, name)))

    def check_local_chunks(
        self, chunk_sizes: Sequence[int], shard_lengths: int | Sequence[int | None] | None = None
    ) -> None:
        """Raise what `set_local_chunks` would with these arguments, and change nothing: for a swap that comes later."""
        self._with_local_chunks(chunk_sizes, shard_lengths)

    def _with_local_chunks(
        self, chunk_sizes: Sequence[int], shard_lengths: int | Sequence[int | None] | None
    ) -> TNTConfig:
        """A checked copy of the config with these chunks; see `set_local_chunks`."""
        memories = [len(layer.local_memories) for layer in self.memory_layers().values()]
        if not memories:
            raise ValueError("a model of attention layers alone has no local memories whose chunks could be set")
        memories = memories[0]
        changed = copy.copy(self.config)
        changed.local_chunk_sizes = list(chunk_sizes) if isinstance(chunk_sizes, tuple) else chunk_sizes
        if shard_lengths is not None:
            changed.local_shard_lengths = list(shard_lengths) if isinstance(shard_lengths, tuple) else shard_lengths
        if isinstance(changed.local_chunk_sizes, list) and len(changed.local_chunk_sizes) != memories:
            raise ValueError(
                f"local_chunk_sizes={changed.local_chunk_sizes} must have one entry for each of the model's {memories} "
                "local memories: their number is fixed when a model is made; give as many"
            )
        changed.validate()
        return changed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConvolution):
            bound = 1 / math.sqrt(module.weight.shape[1])
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, TNTGate):
            init.constant_(module.bias, module.initial_logit)
        elif isinstance(module, TNTMemory):
            self._init_memory(module)

    def _init_memory(self, memory: TNTMemory) -> None:
        kind, std = memory_kind(self.config.memory_type), self.config.memory_initializer_range
        for weight, bias in memory.params.fast_weights.maps:
            # With the residual norm a tiny W_init makes the first gradient of a shard huge: the norm divides by a tiny
            # deviation. So the default is the scale that keeps the norm of what comes in.
            init.normal_(weight, std=kind.initial_std(weight.shape[1]) if std is None else std)
            if bias is not None:
                init.zeros_(bias)
        if memory.norm_bias is not None:
            init.zeros_(memory.norm_bias)
        for one in (memory.row_scale, memory.row_exponent):
            if one is not None:
                init.ones_(one)
        if memory.norm_weight is not None:
            init.constant_(memory.norm_weight, self.config.memory_norm_init)


class TNTModel(TNTPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: TNTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TNTBlock(config, i) for i in range(config.num_hidden_layers))
        self.rotary_emb = TNTRotaryEmbedding(config) if config.has_attention else None
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        past_key_values: Cache | None = None,
    ) -> BaseModelOutputWithPast:
        """Read a batch of sequences.

        Args:
            input_ids: [B, T] token ids, T ≥ 1; or
            inputs_embeds: [B, T, hidden_size].
            attention_mask: [B, T], or [B, tokens in the cache + T]: 0 at padding, on either side. Padding does not
                count as a position and leaves every state alone; its outputs are zero.
            position_ids: [B, T] or [1, T]. Positions are counted by the memories themselves; where they do not rise
                from one token of a row to the next, another, packed sequence begins.
            seq_idx: [B, T] or [1, T] index of the packed sequence of each token, instead of position_ids.
            cu_seqlens: [N + 1] boundaries of the packed sequences of a single row (B = 1), instead of either.
            cu_seq_lens_q, cu_seq_lens_k: the same under transformers' names; must agree. max_length_* are not needed.
            cache: `DynamicCache(config=model.config)`, or what an earlier call returned: the states to start from. They
                are replaced by those after the last token unless use_cache is False.
            past_key_values: the same, under its name in transformers before 5.24. Outputs have it under both names.
            use_cache: return the states. None: if a cache is given, or else `config.use_cache` outside of training and
                packing (packed sequences have no state of their own to return) and context parallel.
            output_hidden_states: also return [B, T, hidden_size] before each block and after the final norm.
            output_attentions: there are none; True raises.

        With `enable_context_parallel` all arguments are whole in every rank, and hidden states are those of the rank's
        own columns, `context_parallel.columns(T)`.

        A single token behind a cache, without gradients, is written into the cache in place, unless
        `config.kernel_backend` is "reference". kernels/README.md says which calls `torch.compile` and CUDA graphs can
        take, modeling_tnt/README.md what `torch.export` can.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, no token, shapes that do not fit, a cache of
                another configuration or batch size, packed sequences behind a cache, or under torch.jit.trace. With
                context parallel, ranks that got different batches, or a cache with gradients.
        """
        check_not_traced()
        cache = one_cache(cache, past_key_values)
        given = self._check_inputs(input_ids, inputs_embeds)
        batch_shape = (given.shape[0], given.shape[1])
        if output_attentions:
            raise ValueError("output_attentions=True: a TNT model has no attention weights; use False")
        if cache is not None:
            check_cache(cache, self.config, batch_shape[0])
            check_mask(cache, attention_mask, batch_shape[1])
        boundaries = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        boundaries = {name: ends for name, ends in boundaries.items() if ends is not None}
        columns = {
            "attention_mask": attention_mask, "position_ids": position_ids, "seq_idx": seq_idx,
            "past_length": 0 if cache is None else cache.get_seq_length(),
        }  # fmt: skip
        packing = step = part = None
        context = self.context_parallel
        if context is not None:
            self._check_same_in_all_ranks(context, input_ids, inputs_embeds, boundaries, columns, cache, use_cache)
        backend = self._step_backend(batch_shape, cache, use_cache) if not boundaries and context is None else None
        if backend is not None:
            step = plan_step(batch_shape, given.device, backend, step_options(self.config), **columns)
        else:
            device = given.device if context is None else torch.device("cpu")
            packing = plan_packing(batch_shape, device, boundaries=boundaries, **columns)
        use_cache = self._decide_use_cache(use_cache, cache, packing, batch_shape[0])
        relays = [None] * len(self.layers)
        if context is not None:
            keep_all = use_cache or cache is not None
            part = context.plan(packing, batch_shape, keep_all).to(given.device)
            packing, relays = part.packing, context.relays(part, len(self.layers), keep_all)
            input_ids, inputs_embeds = (None if x is None else part.take(x) for x in (input_ids, inputs_embeds))
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = step or packing
        if tokens is not None:
            hidden_states = tokens.hide(hidden_states)
        attention = None
        if self.config.memory_as in ("layer", "gate") and cache is not None:
            for cache_layer in memory_cache_layers(cache):
                cache_layer.attend_within(self.config.sliding_window)
        if self.rotary_emb is not None:
            attention = plan_attention(
                self.config, self.rotary_emb, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                packing=packing, cache=cache if cache is None or use_cache else reading_copy(cache), step=step,
            )  # fmt: skip
        kept = []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                kept.append(hidden_states)
            cache_layer = None if cache is None else cache.layers[i]
            hidden_states = layer(hidden_states, packing, cache_layer, use_cache, step, relays[i], attention)
            if use_cache and layer.has_memory:
                cache_layer.advance(batch_shape[1])
                if attention is not None and attention.windows is not None:
                    cache_layer.attended = attention.windows.attended
        kept.append(self.norm(hidden_states))
        if tokens is not None:  # zero already, but for what an adapter may add to it
            kept = [tokens.hide(hidden) for hidden in kept]
        if part is not None:
            kept = [hidden[:, : len(part.columns)] for hidden in kept]
            if use_cache:
                context.share_cache(cache)
        return BaseModelOutputWithPast(
            last_hidden_state=kept[-1],
            hidden_states=tuple(kept) if output_hidden_states else None,
            **named_cache(cache if use_cache else None),
        )

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one that is given, with a shape that fits."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_size = self.config.hidden_size
        if inputs_embeds is None:
            given, name, layout, fits = input_ids, "input_ids", "[B, T]", input_ids.dim() == 2
        else:
            fits = inputs_embeds.dim() == 3 and inputs_embeds.shape[2] == hidden_size
            given, name, layout = inputs_embeds, "inputs_embeds", f"[B, T, {hidden_size}]"
        if inputs_embeds is None and input_ids.is_floating_point():
            raise TypeError(f"input_ids must be integers, got {input_ids.dtype}; pass embeddings as inputs_embeds")
        if not fits or given.shape[0] < 1 or given.shape[1] < 1:
            raise ValueError(f"{name} must have shape {layout} with B ≥ 1 and T ≥ 1, got {tuple(given.shape)}")
        return given

    def _check_same_in_all_ranks(
        self,
        context: ContextParallel,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        boundaries: dict[str, Tensor],
        columns: dict[str, Tensor | int | None],
        cache: Cache | None,
        use_cache: bool | None,
    ) -> None:
        """Of a cache, how much it has read: by that a rank knows what it gets from the others."""
        tensors = [input_ids, inputs_embeds, *(t for t in columns.values() if isinstance(t, Tensor))]
        tensors += [*boundaries.values(), None if cache is None else cache.layers[0].tokens_read]
        asked = [columns["past_length"], -1 if use_cache is None else use_cache, torch.is_grad_enabled()]
        context.check_same("the batch, the cache and use_cache", *tensors, numbers=asked)

    def _step_backend(self, batch_shape: tuple[int, int], cache: Cache | None, use_cache: bool | None) -> str | None:
        """The backend of a call that reads a token a row behind a cache and writes it in place; None for any other."""
        layers = self.memory_layers()
        if batch_shape[1] != 1 or cache is None or use_cache is False or torch.is_grad_enabled() or not layers:
            return None
        backend = next(iter(layers.values())).step_backend()
        return None if backend == "reference" else backend

    def _decide_use_cache(
        self, use_cache: bool | None, cache: Cache | None, packing: Packing | None, batch: int
    ) -> bool:
        """Whether this call replaces or makes a cache; see `forward`."""
        packed = packing is not None and packing.rows != batch
        shared_out = self.context_parallel is not None
        if use_cache is None:
            alone = not (self.training or packed or shared_out)
            use_cache = cache is not None or (self.config.use_cache and alone)
        if shared_out and (use_cache or cache is not None) and torch.is_grad_enabled():
            raise ValueError(
                "context parallel takes and returns a cache without gradients only; read under torch.no_grad(), as "
                "model.memorize does, or use use_cache=False and no cache"
            )
        if packed and (use_cache or cache is not None):
            raise ValueError(
                f"{packing.rows} packed sequences in {batch} rows leave no state per row; use use_cache=False and no "
                "cache, or one sequence a row with an attention_mask"
            )
        if self.training and self.gradient_checkpointing and (use_cache or cache is not None):
            if cache is not None:
                raise ValueError(
                    "gradient checkpointing runs every block twice; in training it excludes a cache (past_key_values); "
                    "use use_cache=False, or call model.eval() to read on behind one"
                )
            warn_no_cache_when_checkpointing()
            return False
        return use_cache


class TNTForCausalLM(TNTPreTrainedModel, TNTGenerationMixin):
    """`TNTModel` with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: TNTConfig) -> None:
        super().__init__(config)
        self.model = TNTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        past_key_values: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and their cross-entropy if `labels` are given. See `TNTModel.forward` for the rest.

        With `enable_context_parallel` the logits are those of this rank's columns, the loss is that of the whole batch.

        Args:
            labels: [B, T] token ids, −100 where there is nothing to predict; shifted by one inside. In packed batches
                the first token of every sequence must be −100 (transformers' collators see to that).
            logits_to_keep: only the last n columns (0: all), or those at the indices of a tensor.
            num_items_in_batch: divide the summed loss by this, instead of the number of labels in this call (gradient
                accumulation).

        Raises:
            ValueError: what `TNTModel.forward` raises; with context parallel, other logits_to_keep than 0.
        """
        context = self.context_parallel
        if context is not None:
            _check_whole(context, labels, num_items_in_batch, logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            return_dict=True,
        )
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None and context is None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        elif labels is not None:
            loss = self._sum_loss(context, logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **named_cache(cache_of(outputs)),
        )

    def _sum_loss(
        self, context: ContextParallel, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """The loss of the whole batch. What a rank's last column predicts is the first label of the next rank."""
        next_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if num_items_in_batch is None:
            num_items_in_batch = (next_labels != -100).sum()
        columns = context.columns(labels.shape[1])
        own = next_labels[:, columns.start : columns.stop].contiguous()
        loss = self.loss_function(
            logits, None, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch, shift_labels=own
        )
        return context.sum_loss(loss)


def _check_whole(
    context: ContextParallel,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    logits_to_keep: int | Tensor,
) -> None:
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError(
            "logits_to_keep must be 0 with context parallel, where each rank has the logits of its own columns, got "
            f"{logits_to_keep}; choose among these, by context_parallel.columns(T)"
        )
    if labels is not None:
        divisor = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=labels.device)
        context.check_same("labels, and num_items_in_batch,", labels, divisor)
