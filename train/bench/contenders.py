"""Who is timed by `tnt bench kernels`: our memory with each backend, and the peers, behind one interface.

ours           `local_memory` with each of --backends: biases, residual norm, plain descent; gradients of q, k, v,
               lr and every parameter.
fla            `chunk_ttt_linear` of flash-linear-attention: a linear memory with bias and norm. It has no reset, so
               it gets each shard as a row of a larger batch: the same resets, and as much parallel work. Its state
               starts at given weights, as ours; it has no projection of the query, and its output is y + LN(y).
flash, cudnn   causal attention through torch's SDPA, with FlashAttention's or cuDNN's kernel and no other: the same
               heads on the same q, k, v.
titans         `NeuralMemory` of titans-pytorch, a whole layer: norms, projections, gates (momentum and decay among
               them) and output projection are part of its time. Its weights move on every max(64, chunk) tokens, and
               it never resets.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_tnt.kernels import MemoryParams, local_memory

from ..common.costs import FORWARD, attention_bytes, attention_operations, memory_bytes, memory_operations
from ..common.timing import MISSING, Refused
from .arguments import DTYPES, KernelBenchArguments

TITANS_UPDATE_TOKENS = 64
TITANS_LARGEST_STEP = 0.01  # with its default, 1, fresh weights diverge within 1,024 random tokens


@dataclass(frozen=True)
class Case:
    """One measurement. `memory` and `chunk_size` are None for attention; batch is tokens / length."""

    contender: str
    memory: str | None
    chunk_size: int | None
    length: int
    mode: str


class Work(NamedTuple):
    """A call that is ready to run on one set of inputs, the tensors that get a gradient, and that of the output."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    upstream: Tensor

    def run(self, mode: str) -> tuple[Tensor | None, ...]:
        """The output and, unless `mode` is "forward", the gradient of every leaf; None where there is none."""
        if mode == FORWARD:
            with torch.no_grad():
                return (self.forward(),)
        o = self.forward()
        return o.detach(), *torch.autograd.grad(o, self.leaves, self.upstream.to(o.dtype), allow_unused=True)


class Inputs(NamedTuple):
    """q, k, v and the gradient of the output [B, T, H, D] in the benchmark's dtype; lr [B, T, H] in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    upstream: Tensor


class Contender:
    """What every contender has. `costs` are operations and bytes per token and head, where they are known."""

    name: str
    memories: tuple[str | None, ...] = (None,)
    devices: tuple[str, ...] = ("cpu", "cuda")
    is_ours = False

    def prepare(self, case: Case, args: KernelBenchArguments, generator: torch.Generator) -> Work:
        """Draw inputs and weights. Raises `Refused` when this contender is not installed."""
        raise NotImplementedError

    def costs(self, case: Case, args: KernelBenchArguments) -> tuple[int, int] | None:
        return None


class OurMemory(Contender):
    is_ours = True
    memories = ("mlp", "linear")

    def __init__(self, backend: str):
        self.name = backend

    def prepare(self, case: Case, args: KernelBenchArguments, generator: torch.Generator) -> Work:
        inputs = draw_inputs(args, args.tokens // case.length, case.length, generator)
        params = draw_params(args, case.memory, generator)
        options = memory_options(args, case.memory, case.chunk_size, args.shard_length)
        return memory_work(inputs, params, options, self.name)

    def costs(self, case: Case, args: KernelBenchArguments) -> tuple[int, int]:
        return _memory_costs(case, args, projection_of(args, case.memory))


class FlaTttLinear(Contender):
    name = "fla"
    memories = ("linear",)
    devices = ("cuda",)

    def prepare(self, case: Case, args: KernelBenchArguments, generator: torch.Generator) -> Work:
        chunk_ttt_linear = _import("fla.ops.ttt", "flash-linear-attention").chunk_ttt_linear
        length = min(case.length, args.shard_length or case.length)
        if case.length % length:
            raise ValueError(f"it cannot reset within a row, and shards of {length} do not divide {case.length} tokens")
        rows = args.tokens // length
        inputs = draw_inputs(args, rows, length, generator)
        params = draw_params(args, "linear", generator)
        lr = inputs.lr.unsqueeze(-1).to(inputs.q.dtype).detach().requires_grad_()

        def forward() -> Tensor:
            # Its backward compiles for a norm in the dtype of q only.
            norm = (t.to(inputs.q.dtype) for t in (params.norm_weight, params.norm_bias))
            return chunk_ttt_linear(
                inputs.q, inputs.k, inputs.v, *norm, lr, scale=1.0,
                chunk_size=case.chunk_size, initial_state=params.w1.expand(rows, -1, -1, -1).contiguous(),
                initial_state_bias=params.b1.unsqueeze(-2).expand(rows, -1, -1, -1).contiguous(),
            )[0]  # fmt: skip

        leaves = [inputs.q, inputs.k, inputs.v, lr, *(p for p in params if p is not None)]
        return Work(forward, leaves, inputs.upstream)

    def costs(self, case: Case, args: KernelBenchArguments) -> tuple[int, int]:
        return _memory_costs(case, args, "none")


class Attention(Contender):
    def __init__(self, name: str, kernel: SDPBackend):
        self.name, self.kernel = name, kernel
        if kernel is SDPBackend.CUDNN_ATTENTION:
            self.devices = ("cuda",)

    def prepare(self, case: Case, args: KernelBenchArguments, generator: torch.Generator) -> Work:
        inputs = draw_inputs(args, args.tokens // case.length, case.length, generator)
        leaves = [inputs.q, inputs.k, inputs.v]

        def forward() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in leaves)
            with sdpa_kernel(self.kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return Work(forward, leaves, inputs.upstream)

    def costs(self, case: Case, args: KernelBenchArguments) -> tuple[int, int]:
        operations = attention_operations(case.mode, head_dim=args.head_dim, length=case.length)
        return operations, attention_bytes(case.mode, head_dim=args.head_dim, itemsize=DTYPES[args.dtype].itemsize)


class TitansMemory(Contender):
    name = "titans"
    memories = ("mlp",)

    def prepare(self, case: Case, args: KernelBenchArguments, generator: torch.Generator) -> Work:
        neural_memory = _import("titans_pytorch", "titans-pytorch").NeuralMemory
        dim, dtype = args.heads * args.head_dim, DTYPES[args.dtype]
        memory = neural_memory(
            dim=dim, heads=args.heads, dim_head=args.head_dim, chunk_size=case.chunk_size,
            batch_size=max(TITANS_UPDATE_TOKENS, case.chunk_size), default_step_transform_max_lr=TITANS_LARGEST_STEP,
            default_model_kwargs={"depth": 2, "expansion_factor": float(args.expansion)},
        ).to(args.device, dtype)  # fmt: skip
        shape = (args.tokens // case.length, case.length, dim)
        x, upstream = (torch.randn(shape, generator=generator, device=args.device).to(dtype) for _ in range(2))
        return Work(lambda: memory(x)[0], [x.requires_grad_(), *memory.parameters()], upstream)


def make_contenders(args: KernelBenchArguments) -> list[Contender]:
    """Ours first, then the peers that were asked for."""
    peers = {
        "fla": FlaTttLinear,
        "flash": lambda: Attention("flash", SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: Attention("cudnn", SDPBackend.CUDNN_ATTENTION),
        "titans": TitansMemory,
    }
    return [*map(OurMemory, args.backends), *(make() for name, make in peers.items() if name in args.peers)]


def draw_inputs(args: KernelBenchArguments, batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Random inputs as a model has them: queries and keys of length 1, step sizes below 0.1."""
    dtype, shape = DTYPES[args.dtype], (batch, length, args.heads, args.head_dim)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=args.device)

    q, k, v = (x.to(dtype).requires_grad_() for x in (_unit(normal()), _unit(normal()), normal()))
    lr = 0.1 * torch.rand(shape[:-1], generator=generator, device=args.device)
    return Inputs(q, k, v, lr.requires_grad_(), normal().to(dtype))


def draw_params(args: KernelBenchArguments, memory: str, generator: torch.Generator) -> MemoryParams:
    """Random float32 parameters with biases and residual norm; weights of fan-in scale."""
    H, D = args.heads, args.head_dim
    M = D * args.expansion if memory == "mlp" else D

    def leaf(*shape: int, mean: float, std: float) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator, device=args.device)).requires_grad_()

    return MemoryParams(
        w1=leaf(H, D, M, mean=0.0, std=D**-0.5),
        b1=leaf(H, M, mean=0.0, std=0.1),
        w2=leaf(H, M, D, mean=0.0, std=M**-0.5) if memory == "mlp" else None,
        b2=leaf(H, D, mean=0.0, std=0.1) if memory == "mlp" else None,
        norm_weight=leaf(H, D, mean=1.0, std=0.1),
        norm_bias=leaf(H, D, mean=0.0, std=0.1),
    )


def projection_of(args: KernelBenchArguments, memory: str) -> str:
    """A linear memory is read at the raw query: that is what its peer can do."""
    return args.qk_projection if memory == "mlp" else "none"


def memory_options(args: KernelBenchArguments, memory: str, chunk_size: int, shard_length: int) -> dict[str, Any]:
    """What `local_memory` is called with besides tensors and backend; shard_length 0: never reset."""
    projection = projection_of(args, memory)
    return {"chunk_size": chunk_size, "shard_length": shard_length or None, "qk_projection": projection}


def memory_work(inputs: Inputs, params: MemoryParams, options: dict[str, Any], backend: str) -> Work:
    """A call of `local_memory` with gradients of everything that can have one."""

    def forward() -> Tensor:
        return local_memory(inputs.q, inputs.k, inputs.v, inputs.lr, params, backend=backend, **options)[0]

    leaves = [inputs.q, inputs.k, inputs.v, inputs.lr, *(p for p in params if p is not None)]
    return Work(forward, leaves, inputs.upstream)


def _memory_costs(case: Case, args: KernelBenchArguments, projection: str) -> tuple[int, int]:
    operations = memory_operations(
        case.mode, memory=case.memory, head_dim=args.head_dim, expansion=args.expansion, chunk_size=case.chunk_size,
        qk_projection=projection,
    )  # fmt: skip
    return operations, memory_bytes(case.mode, head_dim=args.head_dim, itemsize=DTYPES[args.dtype].itemsize)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _import(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{distribution} cannot be imported ({error}); pip install {distribution}"
        raise Refused(MISSING, reason) from error
