"""The token mixer: a global memory and local memories that are trained on the sequence while they read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .cache import TNTCacheLayer, cache_signature, fast_weight_shapes
from .configuration import TNTConfig
from .context_relay import CONV, Relay
from .convolution import ShortConvolution, is_watched
from .kernels import MemoryParams, MemoryState, choose_backend, initial_memory_state
from .kernels.api import read
from .kernels.backends import KERNELS, qkv_kernels
from .kernels.checks import MemoryProblem
from .kernels.step import StepMemory, layer_step, step_backend_for, step_memories, unchecked_step
from .kernels.types import MemoryGates, MemoryOptions
from .packing import Packing, TokenStep

# Initial gates: half of the earlier surprise stays in the momentum; a token's trace halves after about 280 tokens.
# The step size starts at half of its base.
_MOMENTUM_LOGIT = 0.0
_DECAY_LOGIT = -6.0


class MemoryInputs(NamedTuple):
    """What a memory brings to a call of its operation, as it stands inside of the memory's own forward.

    gate_logits  of its step size, momentum and decay, [B, T, H] each, or None where one is not enabled.
    base_lr      η_base, by which the gate of the step size is multiplied.
    token_scale  [chunk_size] or None.
    """

    params: MemoryParams
    gate_logits: MemoryGates
    base_lr: float
    token_scale: Tensor | None

    def gates(self) -> MemoryGates:
        """η(x) = η_base σ(θ·x + b) (TTT), and Titans' momentum and decay."""
        lr, momentum, decay = (None if logits is None else torch.sigmoid(_widen(logits)) for logits in self.gate_logits)
        return MemoryGates(self.base_lr * lr, momentum, decay)


def step_options(config: TNTConfig) -> tuple[MemoryOptions, ...]:
    """How the memories of any layer read, in their order. Read from the config at each call: sizes may change."""
    options, kind = [], config.memory_type
    if config.global_chunk_size is not None:
        options.append(
            MemoryOptions(config.global_chunk_size, is_global=True, memory_type=kind, update=config.global_update)
        )
    projection = (config.qk_projection, config.normalize_projection, config.token_scale, kind)
    for chunk_size, shard_length in zip(config.local_chunk_sizes, config.shard_lengths, strict=True):
        options.append(MemoryOptions(chunk_size, shard_length, False, *projection))
    return tuple(options)


class TNTGate(NonDynamicallyQuantizableLinear):
    """The logits of a gate: one for each head, from a token's hidden state.

    The base class is torch's name for a linear map that weight quantization leaves alone: a gate has a few rows only,
    so that there is nothing to be saved.
    """

    def __init__(self, hidden_size: int, heads: int, initial_logit: float) -> None:
        super().__init__(hidden_size, heads)
        self.initial_logit = initial_logit


class TNTMemory(nn.Module):
    """The learned parameters of one memory: initial fast weights, output norm, and the gates of its inner optimiser.

    No shape depends on a chunk size or a shard length, so that both can be changed after training. Whatever wraps this
    module's forward (adapters of its parameters, hooks that bring offloaded ones) holds inside of it only: a model
    reads a memory's parameters nowhere else.
    """

    def __init__(self, config: TNTConfig, base_lr: float, with_token_scale: bool) -> None:
        super().__init__()
        heads, dim = config.num_heads, config.head_dim
        self.base_lr = base_lr
        shapes = fast_weight_shapes(config)
        self.weight_names = tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.norm_weight = nn.Parameter(torch.empty(heads, dim)) if config.memory_residual_norm else None
        self.norm_bias = nn.Parameter(torch.empty(heads, dim)) if config.memory_residual_norm else None
        self.lr_gate = TNTGate(config.hidden_size, heads, 0.0)
        self.momentum_gate = TNTGate(config.hidden_size, heads, _MOMENTUM_LOGIT) if config.use_momentum else None
        self.decay_gate = TNTGate(config.hidden_size, heads, _DECAY_LOGIT) if config.use_forget_gate else None
        self.row_scale = nn.Parameter(torch.empty(1)) if with_token_scale else None
        self.row_exponent = nn.Parameter(torch.empty(1)) if with_token_scale else None

    @property
    def params(self) -> MemoryParams:
        """What the memory operations take."""
        norm = {"norm_weight": self.norm_weight, "norm_bias": self.norm_bias}
        return MemoryParams(**{name: getattr(self, name) for name in self.weight_names}, **norm)

    def forward(self, x: Tensor, chunk_size: int, use: Callable[[MemoryInputs], Any] | None = None) -> Any:
        """What `use` makes of this memory's inputs for the tokens x [B, T, hidden_size]; None: the inputs."""
        if torch.is_autocast_enabled(x.device.type):  # products of many gates follow: bfloat16 has too few digits
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, chunk_size, use)
        gates = (self.lr_gate, self.momentum_gate, self.decay_gate)
        logits = [None if gate is None else gate(x.to(gate.weight.dtype)) for gate in gates]
        inputs = MemoryInputs(self.params, MemoryGates(*logits), self.base_lr, self.token_scale(chunk_size))
        return inputs if use is None else use(inputs)

    def token_scale(self, chunk_size: int) -> Tensor | None:
        """r [chunk_size], r_pos = scale · (pos + 1)^(−exponent): TTT's learned 1/(pos + 1), for any chunk size."""
        if self.row_scale is None:
            return None
        positions = torch.arange(1, chunk_size + 1, device=self.row_scale.device, dtype=torch.float32)
        return self.row_scale * torch.exp(-_widen(self.row_exponent) * positions.log())


def reads_by_kernels(backend: str, problem: MemoryProblem) -> bool:
    """Whether kernels, which are few operators, run a call from the learned start; its arguments are checked there."""
    if backend != "auto":
        return backend in KERNELS
    return choose_backend(problem.q.device.type, problem).name in KERNELS


# Outside of torch.compile's graphs: the loops over chunks of the torch backend, which it would unroll.
_read_apart_from_graphs = torch.compiler.disable(read)


class TNTMemoryLayer(nn.Module):
    """`o_t = f(V, q_t) + Σ_i f(W_t^(i), M_t^(i) q_t)` (TNT eq. 15) with its projections, norm and output gate."""

    def __init__(self, config: TNTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_shape = (config.num_heads, config.head_dim)
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False) if config.use_output_gate else None
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.conv = ShortConvolution(3 * inner, config.conv_kernel_size) if config.conv_kernel_size else None
        has_global = config.global_chunk_size is not None
        self.global_memory = TNTMemory(config, config.global_memory_base_lr, False) if has_global else None
        self.local_memories = nn.ModuleList(
            TNTMemory(config, config.memory_base_lr, config.token_scale) for _ in config.local_chunk_sizes
        )
        self.norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def memories(self) -> dict[str, TNTMemory]:
        """The memories by the name under which a cache keeps their states: "global", "local0", "local1", …"""
        named = {} if self.global_memory is None else {"global": self.global_memory}
        return named | {f"local{i}": memory for i, memory in enumerate(self.local_memories)}

    def project(
        self, x: Tensor, packing: Packing | None = None, conv_tail: Tensor | None = None, return_tail: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, T, hidden_size] → q, k, v as the memories see them, and the convolution's new tail.

        [B, T, H, D], or [1, total, H, D] with `packing`: the real tokens alone.
        """
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        cut = conv_tail is not None or return_tail
        if self.conv is not None and not is_watched(self.conv) and not (cut and packing is not None):
            native = qkv_kernels(self.config.kernel_backend, parts[0], self.config.head_dim)
            if native is not None:
                return self._project_at_once(native, parts, packing, conv_tail, return_tail)
        qkv = torch.cat(parts, dim=-1)
        if packing is not None:
            qkv = packing.gather(qkv)
        if self.conv is not None:
            qkv, conv_tail = self.conv(qkv, packing, conv_tail, return_tail)
        qkv = F.silu(qkv).unflatten(-1, (3, *self.head_shape))
        q, k, v = qkv.unbind(-3)
        return l2_normalize(q), l2_normalize(k), v, conv_tail

    def _project_at_once(
        self,
        native: Any,
        parts: tuple[Tensor, Tensor, Tensor],
        packing: Packing | None,
        conv_tail: Tensor | None,
        return_tail: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`project` by one operator from the projections on. What was read before is put in front, and taken off."""
        boundaries, reach, before = None, self.conv.weight.shape[1] - 1, 0
        if packing is not None:
            parts, boundaries = tuple(map(packing.gather, parts)), packing.boundaries
        if conv_tail is not None:
            before, tails = reach, conv_tail.chunk(3, dim=-1)
            parts = tuple(torch.cat([t.to(x.dtype), x], dim=1) for t, x in zip(tails, parts, strict=True))
        q, k, v = self.conv(parts, use=lambda x, w: native.qkv(*x, w, boundaries, self.config.head_dim))
        if return_tail:
            missing = max(0, reach - parts[0].shape[1])
            conv_tail = torch.cat([x[:, x.shape[1] + missing - reach :] for x in parts], dim=-1)
            conv_tail = F.pad(conv_tail, (0, 0, missing, 0))
        q, k, v = (x[:, before:].contiguous() for x in (q, k, v))
        return q, k, v, conv_tail if return_tail else None

    def project_token(self, x: Tensor, conv_tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`project` for one token a row, x [B, 1, hidden_size] → q, k, v [B, H, D], in fewer operations."""
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if self.conv is not None:
            qkv, conv_tail = self.conv(qkv, tail=conv_tail, one_token=True)
        qkv = F.silu(qkv).view(x.shape[0], 3, *self.head_shape)
        q, k = l2_normalize(qkv[:, :2]).unbind(1)
        return q, k, qkv[:, 2], conv_tail

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache_layer: TNTCacheLayer | None = None,
        update_cache: bool = False,
        step: TokenStep | None = None,
        relay: Relay | None = None,
    ) -> Tensor:
        """Mix the tokens of x [B, T, hidden_size]; what `packing` does not count as a token mixes to zero.

        Arguments as of `mix`.
        """
        return self.o_proj(self.mix(x, packing, cache_layer, update_cache, step, relay))

    def mix(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache_layer: TNTCacheLayer | None = None,
        update_cache: bool = False,
        step: TokenStep | None = None,
        relay: Relay | None = None,
    ) -> Tensor:
        """The same before the last projection, [B, T, H D].

        With a `cache_layer` the memories start from its states; with `update_cache` it gets those after the last token.
        With `step` there is one token a row and the states in the cache are written in place, see `steps`. With `relay`
        x is this rank's part of longer rows.
        """
        if packing is not None and packing.total == 0:
            return x.new_zeros(*x.shape[:2], self.head_shape[0] * self.head_shape[1])
        if step is not None:
            return self._step(x, cache_layer, step)
        o = self._normed(self._read(x, packing, cache_layer, update_cache, relay))
        return self._gated(o if packing is None else packing.scatter(o), x)

    def _normed(self, o: Tensor) -> Tensor:
        """[..., H, D] → [..., H D]."""
        return self.norm(o.to(self.norm.weight.dtype)).flatten(-2)

    def _gated(self, o: Tensor, x: Tensor) -> Tensor:
        return o if self.g_proj is None else o * F.silu(self.g_proj(x))

    def step_backend(self) -> str:
        """The backend that reads a token behind a cache with all memories at once, without gradients; "reference" reads
        it as any other number of tokens."""
        shapes = [shape for name, shape in fast_weight_shapes(self.config).items() if name.startswith("w")]
        c, like = self.config, self.norm.weight
        return step_backend_for(
            c.kernel_backend, c.memory_type, len(shapes), *shapes[0][1:], like.device, c.global_update,
            torch.promote_types(like.dtype, torch.float32),
        ).name  # fmt: skip

    def _read(
        self,
        x: Tensor,
        packing: Packing | None,
        cache_layer: TNTCacheLayer | None,
        update_cache: bool,
        relay: Relay | None,
    ) -> Tensor:
        """The sum of the memories' outputs, shaped like q of `project`."""
        states = {} if cache_layer is None else cache_layer.memories
        tail = None if cache_layer is None else cache_layer.conv_tail
        if relay is not None:
            tail = self._open(relay, x, cache_layer)
        q, k, v, tail = self.project(x, packing, tail, update_cache or (relay is not None and relay.hands_on(CONV)))
        if relay is not None:
            q, tail = relay.send_tail(q, tail), relay.without_ghost(tail)
        outputs, new_states = [], {}
        backend = self.config.kernel_backend
        for name, memory, options in self.operations():

            def use(inputs: MemoryInputs, name: str = name, options: MemoryOptions = options) -> tuple:
                gates = inputs.gates()
                if packing is not None:
                    gates = gates.map(packing.gather)
                state = states.get(name)
                if relay is not None:
                    state = relay.receive_state(name, options, inputs.params, state)
                # Kernels are operators that torch.compile sees; boundaries and positions are read by the host.
                on_device = packing is None and state is None
                problem = MemoryProblem(
                    q, k, v, gates, inputs.params, options, inputs.token_scale,
                    None if packing is None else packing.boundaries, state,
                )  # fmt: skip
                in_graph = on_device and reads_by_kernels(backend, problem)
                wants_state = update_cache or (relay is not None and relay.hands_on(name))
                o, state = (read if in_graph else _read_apart_from_graphs)(problem, wants_state, backend)
                o = _KeepInGraph.apply(o, *gates, *(() if relay is None else inputs.params))
                return (o, state) if relay is None else (relay.send_state(name, o, state), relay.without_ghost(state))

            o, new_states[name] = memory(x, options.chunk_size, use)
            outputs.append(o)
        if update_cache:
            cache_layer.store(new_states, tail, cache_signature(self.config))
        return sum(outputs[1:], outputs[0])

    def _open(self, relay: Relay, x: Tensor, cache_layer: TNTCacheLayer | None) -> Tensor | None:
        """Begin to receive what comes from the rank before, and wait for the first of it: the convolution's tail."""
        with_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        relay.open(x, [(name, options) for name, _, options in self.operations()], cache_layer, with_grad)
        return relay.receive_tail(None if cache_layer is None else cache_layer.conv_tail)

    def _step(self, x: Tensor, cache_layer: TNTCacheLayer, step: TokenStep) -> Tensor:
        """What goes into o_proj, [B, 1, H D], for one token a row, whose states are advanced in place."""
        memories = self.memories()
        if len(step.options) != len(memories):
            self._check_count()
        reads = list(zip(memories.values(), step.options, strict=True))
        watched = self.conv is not None and is_watched(self.conv)
        if step.backend == "native" and not watched and cache_layer.is_stacked(memories):
            launch = layer_step(x, cache_layer.stack, cache_layer.conv_tail)
            if launch is not None:
                return self._step_at_once(x, cache_layer, step, reads, launch)
        q, k, v, tail = self.project_token(x, cache_layer.conv_tail)
        advance = self._advance
        if step.backend != "triton" and torch.compiler.is_compiling():
            advance = torch.compiler.disable(advance)  # it asks the host where chunks end
        o = _inside(reads, x, lambda inputs: advance(q, k, v, inputs, tail, cache_layer, step)).unsqueeze(1)
        return self._gated(self._normed(o), x)

    def _step_at_once(
        self,
        x: Tensor,
        cache_layer: TNTCacheLayer,
        step: TokenStep,
        reads: list[tuple[TNTMemory, MemoryOptions]],
        launch: Callable[..., Tensor],
    ) -> Tensor:
        """The same by one call from the projections on; `launch` is a `layer_step`."""
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if torch.compiler.is_compiling():
            launch = torch.compiler.disable(launch)
        norm = gate = None
        # An offloaded norm has its weight here in its own forward only.
        is_here = self.norm.weight.device == x.device
        if type(self.norm) is nn.RMSNorm and is_here and not is_watched(self.norm):
            norm = self.norm.weight, self.norm.eps
            gate = None if self.g_proj is None else self.g_proj(x)

        def read(inputs: list[MemoryInputs], qkv: tuple[Tensor, ...], taps: Tensor | None) -> Tensor:
            logits = zip(*(given.gate_logits for given in inputs), strict=True)
            return launch(
                *qkv, taps, cache_layer.conv_tail, MemoryGates(*(None if of[0] is None else of for of in logits)),
                [given.base_lr for given in inputs], step.options, [given.params for given in inputs],
                [given.token_scale for given in inputs], cache_layer.stack, step.active, norm, gate,
            )  # fmt: skip

        if self.conv is None:
            o = _inside(reads, x, lambda inputs: read(inputs, qkv, None))
        else:
            o = self.conv(qkv, use=lambda qkv, taps: _inside(reads, x, lambda inputs: read(inputs, qkv, taps)))
        if norm is None:
            return self._gated(self._normed(o), x)
        dtype = norm[0].dtype if gate is None else torch.promote_types(norm[0].dtype, gate.dtype)
        return o.flatten(-2).to(dtype)

    def _advance(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: list[MemoryInputs],
        tail: Tensor | None,
        cache_layer: TNTCacheLayer,
        step: TokenStep,
    ) -> Tensor:
        """The same, o [B, H, D], behind the projections."""
        memories, params = self.memories(), [given.params for given in inputs]
        is_new = not cache_layer.is_stacked(memories)
        if is_new:
            cache_layer.stack_memories(
                list(memories), lambda: self._initial_states(q, params), tail, cache_signature(self.config)
            )
        stack, gates = cache_layer.stack, _stack_gates(inputs)
        token_scales = [given.token_scale for given in inputs]
        unchecked = None if is_new else unchecked_step(step.backend, q, stack)
        if unchecked is not None:
            # All arguments but the cache are our own, and that was checked when it was stacked.
            o = unchecked(q, k, v, gates, step.options, params, token_scales, stack, step.active)
        else:
            per_memory = zip(step.options, params, token_scales, *(_each(g, len(params)) for g in gates), strict=True)
            o = step_memories(
                q, k, v,
                [
                    StepMemory(
                        p, lr, *options[:5], momentum=m, decay=d, token_scale=scale, memory_type=options.memory_type,
                        update=options.update,
                    )  # fmt: skip
                    for options, p, scale, lr, m, d in per_memory
                ],
                stack, active=step.active, backend=self.config.kernel_backend,
            )  # fmt: skip
        cache_layer.advance_tail(tail, step)
        return o

    def _initial_states(self, like: Tensor, params: Sequence[MemoryParams]) -> dict[str, MemoryState]:
        """Before the first token of the rows of `like`, of memories with these parameters."""
        return {
            name: initial_memory_state(
                one, like.shape[0],
                with_momentum=self.config.use_momentum,
                with_projection=not options.is_global and self.config.qk_projection != "none",
                dtype=torch.float64 if like.dtype == torch.float64 else torch.float32,
            )
            for (name, _, options), one in zip(self.operations(), params, strict=True)
        }  # fmt: skip

    def _check_count(self) -> None:
        if len(self.config.local_chunk_sizes) != len(self.local_memories):
            raise ValueError(
                f"local_chunk_sizes={self.config.local_chunk_sizes} must have one entry for each of the model's "
                f"{len(self.local_memories)} local memories"
            )

    def operations(self) -> Iterator[tuple[str, TNTMemory, MemoryOptions]]:
        """Name, module and options of each memory."""
        self._check_count()
        for (name, memory), options in zip(self.memories().items(), step_options(self.config), strict=True):
            yield name, memory, options


def _inside(
    reads: Sequence[tuple[TNTMemory, MemoryOptions]],
    x: Tensor,
    use: Callable[[list[MemoryInputs]], Any],
    inputs: Sequence[MemoryInputs] = (),
) -> Any:
    """`use` of the inputs of several memories, inside of the forward of each of them at once."""
    if not reads:
        return use(list(inputs))
    (memory, options), *others = reads
    return memory(x, options.chunk_size, lambda one: _inside(others, x, use, [*inputs, one]))


def _stack_gates(inputs: list[MemoryInputs]) -> MemoryGates:
    """`MemoryInputs.gates` of all memories for one token a row, [memories, B, H]: one sigmoid for all."""
    kinds = [[given.gate_logits[i] for given in inputs] for i in range(len(MemoryGates._fields))]
    enabled = [kind for kind in kinds if kind[0] is not None]
    gates = iter(torch.sigmoid(_widen(torch.stack([g[:, 0] for kind in enabled for g in kind]))).chunk(len(enabled)))
    lr, momentum, decay = (None if kind[0] is None else next(gates) for kind in kinds)
    for one, given in zip(lr, inputs, strict=True):
        one.mul_(given.base_lr)
    return MemoryGates(lr, momentum, decay)


def _each(gates: Tensor | None, memories: int) -> Sequence[Tensor | None]:
    """One gate per memory, or None for each."""
    return [None] * memories if gates is None else gates.unbind()


class _KeepInGraph(torch.autograd.Function):
    """Returns `o`; gives unused gates and parameters a zero gradient.

    What a memory learns in a chunk that nobody reads back (the global one in its last) depends on its gates, but the
    output does not, and of a memory that starts from the state of another rank the initial weights are not used:
    without a gradient at all, DistributedDataParallel would wait for it.
    """

    @staticmethod
    def forward(ctx, o: Tensor, *others: Tensor | None) -> Tensor:
        ctx.likes = [None if t is None else (t.shape, t.dtype, t.device) for t in others]
        return o.view_as(o)

    @staticmethod
    def backward(ctx, grad: Tensor):
        zeros = (None if x is None else torch.zeros(x[0], dtype=x[1], device=x[2]) for x in ctx.likes)
        return grad, *zeros


def l2_normalize(x: Tensor) -> Tensor:
    """x [..., D] as vectors of length 1; zero stays zero."""
    return F.normalize(_widen(x), dim=-1, eps=1e-6).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
