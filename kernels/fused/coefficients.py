"""How the tokens of a tile act on each other: momentum, forgetting and token scale, forward and backward.

Inside a tile the recurrences S_t = m_t S_{t−1} − lr_t G_t and W_t = (1 − d_t) W_{t−1} + S_t are linear in W, S and G:

    W_t = B_t W + F_t S − Σ_{τ≤t} Θ_tτ lr_τ G_τ          S_end = m S − Σ σ_τ lr_τ G_τ

All coefficients are sums of products of numbers in [0, 1], made by running products and never by logarithms or
division, so gates of exactly 0 and 1 have right values and gradients. A padded row has m = 1, d = 0 and adds nothing to
W (`valid` = 0), so both states pass it unchanged. Vectors over the rows of a tile are columns [R, 1].
"""

import triton
import triton.language as tl


@triton.jit
def causal(R: tl.constexpr):
    """[R, R]: 1 where the column's token is not after the row's."""
    return (tl.arange(0, R)[:, None] >= tl.arange(0, R)[None, :]).to(tl.float32)


@triton.jit
def as_row(column):
    """[R, 1] -> [1, R]."""
    return tl.trans(column)


@triton.jit
def last_row(x, R: tl.constexpr):
    """The last row of [R, F], as [1, F]."""
    return tl.sum(tl.where(tl.arange(0, R)[:, None] == R - 1, x, 0.0), axis=0, keep_dims=True)


@triton.jit
def first_row(x, R: tl.constexpr):
    """The first row of [R, F], as [1, F]."""
    return tl.sum(tl.where(tl.arange(0, R)[:, None] == 0, x, 0.0), axis=0, keep_dims=True)


@triton.jit
def first_column(x, R: tl.constexpr):
    """The first column of [F, R], as [F, 1]."""
    return tl.sum(tl.where(tl.arange(0, R)[None, :] == 0, x, 0.0), axis=1, keep_dims=True)


@triton.jit
def running_products(a, R: tl.constexpr):
    """[t, j] = Π_{j < i ≤ t} a_i for j ≤ t, zero above the diagonal."""
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, R)[None, :]
    factors = tl.where(row > column, a, 1.0)
    return tl.where(row >= column, tl.cumprod(factors, axis=0), 0.0)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def later_products(a, R: tl.constexpr):
    """[j] = Π_{i > j} a_i, the last row of `running_products` as a column [R, 1], from a row [1, R]."""
    later = tl.arange(0, R)[:, None] < tl.arange(0, R)[None, :]
    return tl.reduce(tl.where(later, a, 1.0), 1, multiply, keep_dims=True)


@triton.jit
def products_from_start(a, products, R: tl.constexpr):
    """[t] = Π_{i ≤ t} a_i, from a and its `running_products`: Triton 3.4 to 3.6 cannot scan a single column."""
    return first_row(a, R) * first_column(products, R)


@triton.jit
def products_backward(a, products, from_start, grad_products, grad_from_start, R: tl.constexpr):
    """Gradient of `running_products` and `products_from_start`, without division:

    ā_i = Σ_{t≥i} Π_{i<l≤t} a_l (Σ_{j<i} ḡ_tj Π_{j<l<i} a_l + h̄_t Π_{l<i} a_l)
    """
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, R)[None, :]
    shift = (row == column + 1).to(tl.float32)
    before = tl.dot(shift, products, input_precision="ieee")  # [i, j] = Π_{j<l<i} a_l, zero for j ≥ i
    start_before = tl.where(row == 0, 1.0, tl.sum(shift * as_row(from_start), axis=1, keep_dims=True))
    after = tl.trans(products)  # [i, t] = Π_{i<l≤t} a_l
    inner = tl.dot(after, grad_products, input_precision="ieee")
    outer = tl.sum(after * as_row(grad_from_start), axis=1, keep_dims=True)
    return tl.sum(inner * before, axis=1, keep_dims=True) + outer * start_before


@triton.jit
def gate_coefficients(momentum, keep, valid, R: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr):
    """Θ [R, R] and the running products it is made of.

    Args: momentum m and keep = 1 − d, columns; valid 0/1, column.
    Returns: Θ, B, F, Π m from each token to each later one, and Π m from the start.
    """
    if DECAY:
        kept = running_products(keep, R)
        read_decay = products_from_start(keep, kept, R)
    else:
        kept = causal(R)
        read_decay = 1.0
    added = kept * as_row(valid)
    if MOMENTUM:
        carried = running_products(momentum, R)
        momentum_decay = products_from_start(momentum, carried, R)
        theta = tl.dot(added, carried, input_precision="ieee")
        # Σ_j added_tj Π_{i ≤ j} m_i: a product over all tokens up to j is that over the later ones times the first.
        read_momentum = first_row(momentum, R) * first_column(theta, R)
    else:
        carried = 0.0
        momentum_decay = 0.0
        theta = added
        read_momentum = 0.0
    return theta, kept, read_decay, read_momentum, carried, momentum_decay


@triton.jit
def gate_coefficients_backward(
    momentum, keep, valid, kept, read_decay, carried, momentum_decay,
    grad_theta, grad_read_decay, grad_read_momentum, grad_carried_end, grad_momentum_decay_end,
    R: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Gradients of momentum and keep, columns, from those of Θ, B, F, σ (row [1, R]) and m (scalar, over the tile)."""
    is_last = tl.arange(0, R)[:, None] == R - 1
    grad_momentum = 0.0
    grad_added = grad_theta
    if MOMENTUM:
        added = kept * as_row(valid)
        grad_added = tl.dot(grad_theta, tl.trans(carried), input_precision="ieee")
        grad_added += grad_read_momentum * as_row(momentum_decay)
        grad_carried = tl.dot(tl.trans(added), grad_theta, input_precision="ieee")
        grad_carried += tl.where(is_last, grad_carried_end, 0.0)
        grad_from_start = tl.trans(tl.sum(added * grad_read_momentum, axis=0, keep_dims=True))
        grad_from_start += tl.where(is_last, grad_momentum_decay_end, 0.0)
        grad_momentum = products_backward(momentum, carried, momentum_decay, grad_carried, grad_from_start, R)
    grad_keep = 0.0
    if DECAY:
        grad_keep = products_backward(keep, kept, read_decay, grad_added * as_row(valid), grad_read_decay, R)
    return grad_momentum, grad_keep


@triton.jit
def tile_coefficients(
    momentum, decay,  # [tokens, H] float32, or None
    scale,  # [C] float32, or None
    origin,  # number of the token at the chunk's place 0
    place, valid,  # [R]: place in the chunk, and whether there is such a token
    head,
    completes,  # whether the tile is the last of a chunk that has all its tokens
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Every coefficient of a tile: Θ [R, R], B, F [R, 1] for its reads; γ [R, 1], B, F for the weights after it; σ, m
    for the momentum after it; and, for the backward, m, 1 − d, valid (columns) and the running products.

    With a token scale r, W_t = W_anchor − r_t Σ lr G over the whole chunk: F then multiplies the anchor (1 − r_t), and
    in mid-chunk the state is the unscaled sum.
    """
    column = valid.to(tl.float32)[:, None]
    m, keep = 0.0, 1.0
    kept, carried, momentum_decay = 0.0, 0.0, 0.0
    read_decay, read_second = 1.0, 0.0
    gain, end_decay, end_second = 1.0, 1.0, 0.0
    momentum_gain, end_momentum_decay = 0.0, 0.0
    if MOMENTUM:
        m = tl.load(momentum + origin * H + head + place * H, mask=valid, other=1.0)[:, None]
    if DECAY:
        keep = 1.0 - tl.load(decay + origin * H + head + place * H, mask=valid, other=0.0)[:, None]
    if MOMENTUM or DECAY:
        theta, kept, read_decay, read_second, carried, momentum_decay = gate_coefficients(
            m, keep, column, R, MOMENTUM, DECAY
        )
        gain = tl.trans(last_row(theta, R))
        if DECAY:
            end_decay = last_row(read_decay, R)
        if MOMENTUM:
            end_second = last_row(read_second, R)
            momentum_gain = tl.trans(last_row(carried, R))
            end_momentum_decay = last_row(momentum_decay, R)
    else:
        theta = causal(R)
    if SCALE:
        read_decay = tl.load(scale + place, mask=place < C, other=0.0)[:, None]
        read_second = 1.0 - read_decay
        theta *= read_decay
        gain = tl.where(completes, tl.load(scale + C - 1), 1.0)
        end_decay = gain
        end_second = 1.0 - gain
    return (
        theta, read_decay, read_second, gain, end_decay, end_second, momentum_gain, end_momentum_decay,
        m, keep, column, kept, carried, momentum_decay,
    )  # fmt: skip


@triton.jit
def end_coefficients(
    momentum, decay, scale, origin, place, valid, head, completes,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """What the state after a tile needs of `tile_coefficients`, with the same arguments: γ [R, 1], B, F; σ [R, 1], m.

    Gates are rows here, so that γ and σ come out as the columns that they are needed as: nothing is transposed, and the
    recompute spills half of what it does with the last rows of the matrices.
    """
    gain, end_decay, end_second = 1.0, 1.0, 0.0
    momentum_gain, end_momentum_decay = 0.0, 0.0
    if MOMENTUM or DECAY:
        row = tl.arange(0, R)[:, None]
        column = tl.arange(0, R)[None, :]
        gain = valid.to(tl.float32)[:, None]
        if DECAY:
            keep = 1.0 - tl.load(decay + origin * H + head + place * H, mask=valid, other=0.0)
            gain *= later_products(keep[None, :], R)
            end_decay = tl.reduce(keep, 0, multiply)
        if MOMENTUM:
            m = tl.load(momentum + origin * H + head + place * H, mask=valid, other=1.0)
            carried = tl.where(column >= row, tl.cumprod(tl.where(column > row, m[None, :], 1.0), axis=1), 0.0)
            gain = tl.sum(carried * as_row(gain), axis=1, keep_dims=True)
            first_m = tl.sum(tl.where(tl.arange(0, R) == 0, m, 0.0), axis=0)
            end_second = first_m * first_row(gain, R)
            momentum_gain = later_products(m[None, :], R)
            end_momentum_decay = tl.reduce(m, 0, multiply)
    if SCALE:
        gain = tl.where(completes, tl.load(scale + C - 1), 1.0)
        end_decay = gain
        end_second = 1.0 - gain
    return gain, end_decay, end_second, momentum_gain, end_momentum_decay
