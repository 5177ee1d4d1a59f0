// Vectors of the machine's width, and the three things that a tile is made of: products, outer products, transposes.
//
// A tile of R tokens is held with its tokens side by side, [features][R]: the R numbers of one feature are `lanes`. So
// a product with a weight needs no transposed copy of it (its numbers are broadcast, in either direction), and sums over
// features are additions of vectors. Widths of matrices are multiples of 16. Vectors are the extension that GCC and
// Clang share, so the same source compiles for AVX-512, AVX2, NEON and anything else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tnt {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8, ACCUMULATORS = 8;
#else
constexpr int WIDTH = 4, ACCUMULATORS = 16;
#endif

#if defined(__clang__)
#define TNT_UNROLL _Pragma("unroll")
#else
#define TNT_UNROLL _Pragma("GCC unroll 64")
#endif
#define TNT_INLINE inline __attribute__((always_inline))

template <int W> struct VectorOf {
    typedef float type __attribute__((vector_size(W * sizeof(float))));
    typedef float loose __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
    typedef int32_t integer __attribute__((vector_size(W * sizeof(float))));
};
template <int W> using Vector = typename VectorOf<W>::type;

template <int W> TNT_INLINE Vector<W> load(const float* p) {
    return *reinterpret_cast<const typename VectorOf<W>::loose*>(p);
}
template <int W> TNT_INLINE void store(float* p, Vector<W> x) {
    *reinterpret_cast<typename VectorOf<W>::loose*>(p) = x;
}
template <int W> TNT_INLINE Vector<W> broadcast(float x) {
    return Vector<W>{} + x;
}

// What one vector of the lanes of a tile of R tokens holds.
template <int R> constexpr int lane_width = R < WIDTH ? R : WIDTH;

// e^x to 2 units in the last place; NaN stays NaN.
template <int W> TNT_INLINE Vector<W> exp(Vector<W> x) {
    using Integer = typename VectorOf<W>::integer;
    const Vector<W> low = broadcast<W>(-87.0f), high = broadcast<W>(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    // Adding 1.5 · 2^23 rounds to an integer n, which is then in the low bits.
    const Vector<W> rounded = x * 1.44269504f + 12582912.0f;
    const Vector<W> n = rounded - 12582912.0f;
    const Vector<W> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector<W> p = broadcast<W>(1.3888889e-3f);
    p = p * f + 8.3333333e-3f;
    p = p * f + 4.1666667e-2f;
    p = p * f + 1.6666667e-1f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const Integer power = ((Integer)rounded << 23) + 0x3f800000;
    return p * (Vector<W>)power;
}

enum class Into { fresh, add, subtract };

// How many of N rows, a multiple of `block`, are summed in registers at a time.
constexpr int block_of(int vectors, int block) {
    while (block > 1 && block * vectors > ACCUMULATORS) block /= 2;
    return block;
}

// out_g[n][lanes] = (bias[n]) ± Σ_k w(k, n) x_g[k][lanes] for G operands at once, w(k, n) = w[k ld + n], or w[n ld + k]
// if TRANSPOSED. LD is ld where it is known at compile time, or 0.
template <int R, int LD, bool TRANSPOSED, int G, Into INTO>
inline void product_of(
    const float* __restrict w, int ld, int K, int N, const float* const* xs, float* const* outs, const float* bias) {
    constexpr int VW = lane_width<R>, NV = R / VW, NB = block_of(G * NV, LD == R ? R : 16);
    const ptrdiff_t stride = LD ? LD : ld;
    for (int n = 0; n < N; n += NB) {
        Vector<VW> sum[NB][G][NV];
        TNT_UNROLL for (int j = 0; j < NB; j++) {
            const Vector<VW> start = broadcast<VW>(bias ? bias[n + j] : 0.0f);
            TNT_UNROLL for (int g = 0; g < G; g++) TNT_UNROLL for (int v = 0; v < NV; v++) sum[j][g][v] = start;
        }
        const float* wn = TRANSPOSED ? w + n * stride : w + n;
        for (int k = 0; k < K; k++) {
            Vector<VW> x[G][NV];
            TNT_UNROLL for (int g = 0; g < G; g++)
                TNT_UNROLL for (int v = 0; v < NV; v++) x[g][v] = load<VW>(xs[g] + k * R + v * VW);
            TNT_UNROLL for (int j = 0; j < NB; j++) {
                const float weight = TRANSPOSED ? wn[j * stride + k] : wn[k * stride + j];
                TNT_UNROLL for (int g = 0; g < G; g++)
                    TNT_UNROLL for (int v = 0; v < NV; v++) sum[j][g][v] += weight * x[g][v];
            }
        }
        TNT_UNROLL for (int j = 0; j < NB; j++) TNT_UNROLL for (int g = 0; g < G; g++)
            TNT_UNROLL for (int v = 0; v < NV; v++) {
                float* out = outs[g] + (n + j) * R + v * VW;
                if (INTO == Into::fresh) store<VW>(out, sum[j][g][v]);
                if (INTO == Into::add) store<VW>(out, load<VW>(out) + sum[j][g][v]);
                if (INTO == Into::subtract) store<VW>(out, load<VW>(out) - sum[j][g][v]);
            }
    }
}

template <int R, bool TRANSPOSED, Into INTO, int G>
inline void product(
    const float* w, int ld, int K, int N, const float* const (&xs)[G], float* const (&outs)[G],
    const float* bias = nullptr) {
    switch (ld) {
        case 16: return product_of<R, 16, TRANSPOSED, G, INTO>(w, ld, K, N, xs, outs, bias);
        case 32: return product_of<R, 32, TRANSPOSED, G, INTO>(w, ld, K, N, xs, outs, bias);
        case 64: return product_of<R, 64, TRANSPOSED, G, INTO>(w, ld, K, N, xs, outs, bias);
        case 128: return product_of<R, 128, TRANSPOSED, G, INTO>(w, ld, K, N, xs, outs, bias);
        case 256: return product_of<R, 256, TRANSPOSED, G, INTO>(w, ld, K, N, xs, outs, bias);
        default: return product_of<R, 0, TRANSPOSED, G, INTO>(w, ld, K, N, xs, outs, bias);
    }
}

// x W, [K] features -> [N], w [K, N].
template <int R, Into INTO = Into::fresh>
inline void times(const float* w, int K, int N, const float* x, float* out, const float* bias = nullptr) {
    product<R, false, INTO, 1>(w, N, K, N, {x}, {out}, bias);
}
// x Wᵀ, [K] features -> [N], w [N, K].
template <int R, Into INTO = Into::fresh>
inline void times_transposed(const float* w, int K, int N, const float* x, float* out) {
    product<R, true, INTO, 1>(w, K, K, N, {x}, {out});
}
// What R tokens meet: out[τ][t] = Σ_f a[f][τ] b[f][t].
template <int R> inline void meet(const float* a, int F, const float* b, float* out) {
    const float* xs[] = {b};
    float* outs[] = {out};
    product_of<R, R, false, 1, Into::fresh>(a, R, F, R, xs, outs, nullptr);
}
// Back to features: out[f][t] ±= Σ_τ a[f][τ] p[τ][t].
template <int R, Into INTO> inline void spread(const float* a, int F, const float* p, float* out) {
    const float* xs[] = {p};
    float* outs[] = {out};
    product_of<R, R, true, 1, INTO>(a, R, R, F, xs, outs, nullptr);
}

// to[k][n] = from[k][n] + Σ_g Σ_t a_g[k][t] d_g[t][n]: a with its tokens as lanes, [K][R], d token by token, [R][N]; R rows
// each. May be in place.
template <int R, int KB, int NB>
TNT_INLINE void add_outer_block(
    const float* from, float* to, int k, int n, int N, int G, const float* const* as, const float* const* ds) {
    Vector<WIDTH> sum[KB][NB];
    TNT_UNROLL for (int i = 0; i < KB; i++)
        TNT_UNROLL for (int j = 0; j < NB; j++) sum[i][j] = load<WIDTH>(from + (k + i) * N + n + j * WIDTH);
    for (int g = 0; g < G; g++) {
        const float *a = as[g] + k * R, *d = ds[g] + n;
        for (int t = 0; t < R; t++) {
            Vector<WIDTH> row[NB];
            TNT_UNROLL for (int j = 0; j < NB; j++) row[j] = load<WIDTH>(d + t * N + j * WIDTH);
            TNT_UNROLL for (int i = 0; i < KB; i++)
                TNT_UNROLL for (int j = 0; j < NB; j++) sum[i][j] += a[i * R + t] * row[j];
        }
    }
    TNT_UNROLL for (int i = 0; i < KB; i++)
        TNT_UNROLL for (int j = 0; j < NB; j++) store<WIDTH>(to + (k + i) * N + n + j * WIDTH, sum[i][j]);
}
template <int R, int NB> inline void add_outer_columns(
    const float* from, float* to, int K, int n, int N, int G, const float* const* as, const float* const* ds) {
    constexpr int KB = ACCUMULATORS / NB;
    for (int k = 0; k < K; k += KB) add_outer_block<R, KB, NB>(from, to, k, n, N, G, as, ds);
}
template <int R, int G>
inline void add_outer(
    const float* from, float* to, int K, int N, const float* const (&as)[G], const float* const (&ds)[G]) {
    int n = 0;
    for (; n + 4 * WIDTH <= N; n += 4 * WIDTH) add_outer_columns<R, 4>(from, to, K, n, N, G, as, ds);
    for (; n + 2 * WIDTH <= N; n += 2 * WIDTH) add_outer_columns<R, 2>(from, to, K, n, N, G, as, ds);
    for (; n < N; n += WIDTH) add_outer_columns<R, 1>(from, to, K, n, N, G, as, ds);
}
template <int R, int G>
inline void add_outer(float* w, int K, int N, const float* const (&as)[G], const float* const (&ds)[G]) {
    add_outer<R, G>(w, w, K, N, as, ds);
}

template <int W> struct Interleave;
#if defined(__clang__) || __GNUC__ >= 12
#define TNT_SHUFFLE(W, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TNT_SHUFFLE(W, a, b, ...) __builtin_shuffle(a, b, (VectorOf<W>::integer){__VA_ARGS__})
#endif
template <> struct Interleave<4> {
    static TNT_INLINE Vector<4> low(Vector<4> a, Vector<4> b) { return TNT_SHUFFLE(4, a, b, 0, 4, 1, 5); }
    static TNT_INLINE Vector<4> high(Vector<4> a, Vector<4> b) { return TNT_SHUFFLE(4, a, b, 2, 6, 3, 7); }
};
template <> struct Interleave<8> {
    static TNT_INLINE Vector<8> low(Vector<8> a, Vector<8> b) {
        return TNT_SHUFFLE(8, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    }
    static TNT_INLINE Vector<8> high(Vector<8> a, Vector<8> b) {
        return TNT_SHUFFLE(8, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
};
template <> struct Interleave<16> {
    static TNT_INLINE Vector<16> low(Vector<16> a, Vector<16> b) {
        return TNT_SHUFFLE(16, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    }
    static TNT_INLINE Vector<16> high(Vector<16> a, Vector<16> b) {
        return TNT_SHUFFLE(16, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
};

// out[j][i] = x[i][j], W × W numbers: log2 W times, rows i and i + W/2 are interleaved.
template <int W> TNT_INLINE void transpose_block(const float* x, ptrdiff_t ldx, float* out, ptrdiff_t ldo) {
    Vector<W> a[W], b[W];
    TNT_UNROLL for (int i = 0; i < W; i++) a[i] = load<W>(x + i * ldx);
    TNT_UNROLL for (int half = 1; half < W; half *= 2) {
        TNT_UNROLL for (int i = 0; i < W / 2; i++) {
            b[2 * i] = Interleave<W>::low(a[i], a[i + W / 2]);
            b[2 * i + 1] = Interleave<W>::high(a[i], a[i + W / 2]);
        }
        TNT_UNROLL for (int i = 0; i < W; i++) a[i] = b[i];
    }
    TNT_UNROLL for (int i = 0; i < W; i++) store<W>(out + i * ldo, a[i]);
}
// [rows][columns] -> [columns][rows], both multiples of the vectors that R lanes fill; rows of x, and of what comes out,
// are so many numbers apart.
template <int R>
inline void transpose(const float* x, ptrdiff_t ldx, int rows, int columns, float* out, ptrdiff_t ldo) {
    constexpr int W = lane_width<R>;
    for (int i = 0; i < rows; i += W)
        for (int j = 0; j < columns; j += W) transpose_block<W>(x + i * ldx + j, ldx, out + j * ldo + i, ldo);
}
template <int R> inline void transpose(const float* x, int rows, int columns, float* out) {
    transpose<R>(x, columns, rows, columns, out, rows);
}

}  // namespace tnt
