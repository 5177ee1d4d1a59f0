"""The public memory operations: one checked signature in front of every backend.

A memory is a small network per head (a linear map, an MLP, …: memories/kinds.py) that is trained while reading: token t
contributes the gradient `G_t` of `½‖f(W, k_t) − v_t‖²` at the weights W_anchor before its chunk (TNT, arXiv 2511.07343,
eq. 3):

    S_t = momentum_t · S_{t−1} − lr_t · G_t(W_anchor)
    W_t = (1 − decay_t) · W_{t−1} + S_t
"""

from __future__ import annotations

from torch import Tensor

from .backends import load_backend
from .checks import MemoryProblem, check
from .types import MemoryGates, MemoryOptions, MemoryParams, MemoryState


def local_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    params: MemoryParams,
    *,
    chunk_size: int,
    shard_length: int | None = None,
    qk_projection: str = "shard",
    normalize_projection: bool = False,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    token_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: MemoryState | None = None,
    output_final_state: bool = False,
    memory_type: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | None]:
    """Read a sequence with a local memory: `o_t = f(W_t, M_t q_t)` (TNT eq. 6, 7, 14, 15).

    Args:
        q, k, v: [B, T, H, D], any T ≥ 1, all of one floating dtype. Keys are used as they are; the projection divides
            by ‖k‖² (a zero key contributes nothing).
        lr: [B, T, H], the inner step size of each token (not log, not negated).
        params: initial fast weights and norm, see `MemoryParams`.
        chunk_size: tokens whose gradients share one anchor.
        shard_length: reset weights, momentum and projection before every token whose position *in its sequence* is a
            multiple of it; a multiple of chunk_size, or None: never.
        qk_projection: "shard": M_t = Σ k kᵀ/‖k‖² since the last reset (appendix C); "chunk": since the start of the
            chunk (eq. 7 as printed); "none": read at q_t.
        normalize_projection: divide the projected query by its L2 norm (a zero one stays zero).
        momentum, decay: [B, T, H] in [0, 1]; None is 0.
        token_scale: [chunk_size]; W_t = W_anchor − token_scale[t mod chunk_size] · Σ lr G (TTT); excludes both above.
        cu_seqlens: [N + 1] int, packed sequences: B must be 1, sequence n is q[0, cu[n]:cu[n+1]], which may be empty.
        initial_state: the `final_state` of an earlier call, N rows when packed and B otherwise. A sequence may be cut
            anywhere, in mid-chunk too.
        output_final_state: also return the state after the last token; gradients flow through it.
        memory_type: the kind of memory that the parameters are of, see `memory_types`; None: "linear" for one linear
            map, "mlp" for more.
        backend: "auto" | "reference" | "torch" | "native" | "triton"; one that is named and cannot run raises, never
            falls back.

    Returns:
        o [B, T, H, D] in q.dtype, and the final `MemoryState` or None.
    """
    options = MemoryOptions(
        chunk_size, shard_length, False, qk_projection, normalize_projection, token_scale is not None, memory_type
    )
    gates = MemoryGates(lr, momentum, decay)
    problem = MemoryProblem(q, k, v, gates, params, options, token_scale, cu_seqlens, initial_state)
    return read(problem, output_final_state, backend)


def global_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    params: MemoryParams,
    *,
    chunk_size: int,
    momentum: Tensor | None = None,
    decay: Tensor | None = None,
    update: str = "gradient",
    cu_seqlens: Tensor | None = None,
    initial_state: MemoryState | None = None,
    output_final_state: bool = False,
    memory_type: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | None]:
    """Read a sequence with the global memory: `o_t = f(V_anchor, q_t)` (TNT eq. 5, 13, 15).

    Token t reads the state at the *start* of its chunk, at the raw query, and the memory is never reset, so only
    T / chunk_size steps are sequential. Arguments and returns as in `local_memory`, and:

        update: "gradient": the chunk's last weights are the next anchor; "muon": what the chunk has added to a weight
            matrix is made orthogonal, and its columns keep the norms of the initial ones, see `muon`. By torch alone.
    """
    options = MemoryOptions(chunk_size, is_global=True, memory_type=memory_type, update=update)
    problem = MemoryProblem(
        q, k, v, MemoryGates(lr, momentum, decay), params, options, None, cu_seqlens, initial_state
    )  # fmt: skip
    return read(problem, output_final_state, backend)


def read(problem: MemoryProblem, output_final_state: bool, backend: str) -> tuple[Tensor, MemoryState | None]:
    """Check a call, and let a backend run it; see `local_memory`."""
    problem = check(problem)
    return load_backend(backend, problem).read(problem, output_final_state)
