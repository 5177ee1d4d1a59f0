"""One tile of a chunk: R tokens that meet the same anchor. What the forward and the backward kernel share.

The mathematics is that of `torch_backend/chunk.py` (TTT, arXiv 2407.04620, section 2.5). A tile is a whole chunk or
a part of one: gradients are taken at the *anchor*, the weights before the chunk, while reads start from the *current*
weights, those before the tile. A padded token has k = q = v = 0 and lr = 0.

Tensors in registers, float32: tokens [R, D] or [R, M], numbers of a token [R, 1], weights w1 and w2 [M, D] or [D, M],
biases b1 [1, M] and b2 [1, D]. A memory without a bias has the constant 0.0 in its place; a linear one has M == D and
0.0 for its second layer. DT is the dtype of the operands of products (that of the inputs), PRECISION how float32
operands are multiplied.

How the matrices are held decides how the compiler spreads products over warps. TALL: W1 transposed, both [M, D], as
sm_90's warp-group products want it; one with 64 rows would be held twice by 8 warps. Otherwise W2 transposed, both
[D, M]: before sm_90 all products of a tile are spread as one of them is, and a tall one would give every warp all of a
chunk's few tokens. In memory a packed state is always tall.

Registers decide whether the state stays on chip. Hence, here and in the kernels: matrices are cast before they are
transposed, products with a common operand stand side by side, so that it is loaded once and then forgotten, and token
numbers are a 64-bit scalar plus a 32-bit place.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def gradient_operand(DT):
    """The dtype of the operands of a product of gradients, of which loss scaling may make more than float16 holds.

    float32 is then multiplied as TensorFloat-32: as many digits as float16, and the range of float32.
    """
    return tl.float32 if DT == tl.float16 else DT


@triton.jit
def dot(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a b, accumulated in float32."""
    return tl.dot(a.to(DT), b.to(DT), input_precision=PRECISION)


@triton.jit
def add_dot(total, a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, accumulated in float32."""
    return tl.dot(a.to(DT), b.to(DT), acc=total, input_precision=PRECISION)


@triton.jit
def transposed(x, DT: tl.constexpr):
    """xᵀ as an operand: cast first, so that half as much is moved."""
    return tl.trans(x.to(DT))


@triton.jit
def times(x, w, HELD_TRANSPOSED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """x W, for a W that is held as it is or transposed; with the flag reversed, x Wᵀ."""
    if HELD_TRANSPOSED:
        w = transposed(w, DT)
    return dot(x, w, DT, PRECISION)


@triton.jit
def add_times(total, x, w, HELD_TRANSPOSED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """total + x W, like `times`."""
    if HELD_TRANSPOSED:
        w = transposed(w, DT)
    return add_dot(total, x, w, DT, PRECISION)


@triton.jit
def add_outer(total, a, delta, HELD_TRANSPOSED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """total + aᵀ δ, for a matrix that is held as it is or transposed."""
    if HELD_TRANSPOSED:
        total = add_dot(total, transposed(delta, DT), a, DT, PRECISION)
    else:
        total = add_dot(total, transposed(a, DT), delta, DT, PRECISION)
    return total


@triton.jit
def token_sum(x):
    """Sum over the tokens, [R, F] -> [1, F]."""
    return tl.sum(x, axis=0, keep_dims=True)


@triton.jit
def tokens_of_tile(chunk, tile, offset, count, C: tl.constexpr, R: tl.constexpr):
    """The places [R] of a tile's tokens in their chunk, and whether there is a token of the segment.

    `offset` is the place in its chunk of the segment's first token, `count` the number of its tokens.
    """
    place = tile * R + tl.arange(0, R)
    start = tl.maximum(offset - chunk * C, 0).to(tl.int32)
    stop = tl.minimum(offset + count - chunk * C, C).to(tl.int32)
    return place, (place >= start) & (place < stop)


@triton.jit
def load_tokens(pointer, origin, place, head, valid, H: tl.constexpr, D: tl.constexpr):
    """Tokens of [tokens, H, D] as [R, D], zero where not `valid`; in the dtype of the tensor.

    Token numbers are `origin`, a 64-bit scalar, plus `place` [R], 32 bits: half the registers of 64-bit numbers.
    """
    where = place[:, None] * (H * D) + tl.arange(0, D)[None, :]
    return tl.load(pointer + (origin * H + head) * D + where, mask=valid[:, None], other=0.0)


@triton.jit
def store_tokens(pointer, x, origin, place, head, valid, H: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_tokens`."""
    where = place[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(pointer + (origin * H + head) * D + where, x.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def load_scalars(pointer, origin, place, head, valid, other, H: tl.constexpr):
    """Entries of [tokens, H] as [R, 1] float32; `other` where not valid."""
    return tl.load(pointer + origin * H + head + place * H, mask=valid, other=other).to(tl.float32)[:, None]


@triton.jit
def store_scalars(pointer, x, origin, place, head, valid, H: tl.constexpr):
    """The inverse of `load_scalars`."""
    tl.store(pointer + origin * H + head + place[:, None] * H, x, mask=valid[:, None])


@triton.jit
def load_matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A contiguous [ROWS, COLUMNS] matrix."""
    where = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + where)


@triton.jit
def store_matrix(pointer, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `load_matrix`."""
    where = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(pointer + where, x.to(pointer.dtype.element_ty))


@triton.jit
def _weights_at(D: tl.constexpr, M: tl.constexpr, TALL: tl.constexpr):
    """Where the entries of a matrix that is [M, D] in memory lie: as a tile [M, D], or transposed [D, M]."""
    if TALL:
        where = tl.arange(0, M)[:, None] * D + tl.arange(0, D)[None, :]
    else:
        where = tl.arange(0, D)[:, None] + tl.arange(0, M)[None, :] * D
    return where


@triton.jit
def load_state(
    pointer, D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """The fast weights (or their momentum, or gradients) of one head, packed as W1ᵀ, b1, W2, b2."""
    w1 = tl.load(pointer + _weights_at(D, M, TALL))
    pointer += D * M
    b1 = 0.0
    w2 = 0.0
    b2 = 0.0
    if HAS_B1:
        b1 = load_matrix(pointer, 1, M)
        pointer += M
    if MLP:
        w2 = tl.load(pointer + _weights_at(D, M, TALL))
        pointer += M * D
    if HAS_B2:
        b2 = load_matrix(pointer, 1, D)
    return w1, b1, w2, b2


@triton.jit
def store_state(
    pointer, w1, b1, w2, b2, D: tl.constexpr, M: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_state`."""
    tl.store(pointer + _weights_at(D, M, TALL), w1.to(pointer.dtype.element_ty))
    pointer += D * M
    if HAS_B1:
        store_matrix(pointer, b1, 1, M)
        pointer += M
    if MLP:
        tl.store(pointer + _weights_at(D, M, TALL), w2.to(pointer.dtype.element_ty))
        pointer += M * D
    if HAS_B2:
        store_matrix(pointer, b2, 1, D)


@triton.jit
def load_trace(
    pointer, biases, row, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Row `row` of a traced state: W1ᵀ and W2 in the dtype of operands; b1 and b2 apart from them in float32, since
    they are added to results. P: entries of both."""
    SIZE: tl.constexpr = D * M * (2 if MLP else 1)
    w1, b1, w2, b2 = load_state(pointer + row * SIZE, D, M, MLP, False, False, TALL)
    if HAS_B1:
        b1 = load_matrix(biases + row * (P - SIZE), 1, M)
    if HAS_B2:
        b2 = load_matrix(biases + row * (P - SIZE) + (M if HAS_B1 else 0), 1, D)
    return w1, b1, w2, b2


@triton.jit
def store_trace(
    pointer, biases, row, w1, b1, w2, b2, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_trace`."""
    SIZE: tl.constexpr = D * M * (2 if MLP else 1)
    store_state(pointer + row * SIZE, w1, b1, w2, b2, D, M, MLP, False, False, TALL)
    if HAS_B1:
        store_matrix(biases + row * (P - SIZE), b1, 1, M)
    if HAS_B2:
        store_matrix(biases + row * (P - SIZE) + (M if HAS_B1 else 0), b2, 1, D)


@triton.jit
def select_state(
    condition, w1, b1, w2, b2, ow1, ob1, ow2, ob2, MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr
):
    """The first state if a scalar condition holds, otherwise the second."""
    ow1 = tl.where(condition, w1, ow1)
    if HAS_B1:
        ob1 = tl.where(condition, b1, ob1)
    if MLP:
        ow2 = tl.where(condition, w2, ow2)
    if HAS_B2:
        ob2 = tl.where(condition, b2, ob2)
    return ow1, ob1, ow2, ob2


@triton.jit
def read_layer(
    y, s_read, p, delta, theta, read_decay, read_second,
    SCALED: tl.constexpr, SECOND: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer's read `B (x W + b) + F (x S + s) − (P ⊙ Θ) δ`, from y = x W + b and s_read = x S + s.

    S is what reads also depend on: the momentum, or for a token scale the anchor.
    """
    if SCALED:
        y *= read_decay
    if SECOND:
        y += s_read * read_second
    return add_dot(y, -(p * theta), delta, DT, PRECISION)


@triton.jit
def affinity(x, a, HAS_BIAS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """P = x aᵀ, how much each read meets each token (+ 1 with a bias, whose input is a constant 1)."""
    p = dot(x, transposed(a, DT), DT, PRECISION)
    if HAS_BIAS:
        p += 1.0
    return p


@triton.jit
def advance_layer(
    w, b, s, s_bias, a, delta, gain, end_decay, end_second, momentum_gain, momentum_decay,
    HELD_TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SECOND: tl.constexpr,
    MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer after the tile: W_end = B W + F S − aᵀ(γ δ), and with momentum S_end = m S − aᵀ(σ δ)."""
    gained = -delta * gain
    if SCALED:
        w *= end_decay
    if SECOND:
        w += end_second * s
    w = add_outer(w, a, gained, HELD_TRANSPOSED, DT, PRECISION)
    if HAS_BIAS:
        if SCALED:
            b *= end_decay
        if SECOND:
            b += end_second * s_bias
        b += token_sum(gained)
    if MOMENTUM:
        surprise = -delta * momentum_gain
        s = add_outer(s * momentum_decay, a, surprise, HELD_TRANSPOSED, DT, PRECISION)
        if HAS_BIAS:
            s_bias = s_bias * momentum_decay + token_sum(surprise)
    return w, b, s, s_bias
