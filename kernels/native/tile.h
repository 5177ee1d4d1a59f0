// The mathematics of one tile: R tokens of one head that see the same anchor. Forward and backward.
//
// Names, equations and the numbers of steps are those of kernels/README.md. x̄ is `grad_x`. A tile's tensors are held
// with tokens as lanes, [features][R], see vector.h. A chunk may have several tiles: what a tile reads at, W, has moved
// on from the anchor A, where all gradients of the chunk are taken. Tokens past the end of a sequence are zeros with a
// step size of 0: they change nothing.
#pragma once

#include <algorithm>
#include <cmath>

#include "formulas.h"

namespace tnt {

constexpr int MAX_MAPS = 8;

// One linear map of the memory: sizes, and where its weight and its bias (or -1) are in packed fast weights.
struct Map {
    int in, out;
    ptrdiff_t weight, bias;
};

struct Memory {
    int D, M, maps;
    bool has_norm;
    Map map[MAX_MAPS];
    ptrdiff_t size;  // of packed fast weights

    int width(int stage) const { return stage == 0 ? D : M; }  // of a map's input
};

// Hands out 64-byte aligned parts of a piece of memory.
class Arena {
  public:
    explicit Arena(float* room) : next_(room + (-(reinterpret_cast<uintptr_t>(room) / sizeof(float)) & 15)) {}
    float* take(size_t floats) {
        float* p = next_;
        next_ += (floats + 15) & ~size_t(15);
        return p;
    }

  private:
    float* next_;
};

// How the tokens of a tile act on its reads and on the state after it, without their step sizes:
//   read at t: decay[t] W + second[t] S − Σ_τ theta[τ][t] lr_τ G_τ
//   after it:  W = end_decay W + end_second S − Σ_τ end[τ] lr_τ G_τ,   S = momentum_decay S − Σ_τ carried[τ] lr_τ G_τ
// S is the momentum; with a token scale in mid-chunk it is the anchor, which stays.
template <int R> struct Coefficients {
    alignas(64) float theta[R * R], lr[R], decay[R], second[R], end[R], carried[R];
    float end_decay, end_second, momentum_decay;
    bool has_decay, has_second, has_momentum, is_plain;

    // Γ, with tokens that are read from as rows, and γ and σ.
    void gains(float* gamma, float* end_gain, float* momentum_gain) const {
        for (int j = 0; j < R; j++) {
            for (int t = 0; t < R; t++) gamma[j * R + t] = theta[j * R + t] * lr[j];
            end_gain[j] = end[j] * lr[j];
            momentum_gain[j] = carried[j] * lr[j];
        }
    }
};

template <int R> struct CoefficientGradients {
    alignas(64) float gamma[R * R], decay[R], second[R], end_gain[R], momentum_gain[R];
    float end_decay, end_second, momentum_decay;
};

// What the backward of a tile needs again of its keys' side.
template <int R> struct KeyTape {
    float *k, *error, *n, *rstd, *z[MAX_MAPS], *u[MAX_MAPS];

    KeyTape() = default;
    KeyTape(const Memory& m, Arena& arena) {
        k = arena.take(m.D * R), error = arena.take(m.D * R), n = arena.take(m.D * R), rstd = arena.take(R);
        for (int l = 0; l + 1 < m.maps; l++) z[l] = arena.take(m.M * R), u[l] = arena.take(m.M * R);
    }
    static size_t floats(const Memory& m) { return R * (3 * m.D + 2 * (m.maps - 1) * m.M) + 16; }
};

template <int R> class Tile {
    static constexpr int VW = lane_width<R>, NV = R / VW;
    using V = Vector<VW>;

  public:
    const Memory& m;
    const float *gain, *bias;  // of the norm, [D] of this head
    KeyTape<R> tape;           // of the tile at hand
    // Tokens as lanes: values, read rows, outputs, and the gradients of all of them.
    float *v, *x, *o, *grad_k, *grad_v, *grad_x, *grad_o;
    float* grad_gain;  // [D][R], adds up over tiles

    Tile(const Memory& memory, Arena& arena) : m(memory) {
        const int D = m.D, widest = std::max(m.D, m.M);
        for (float** p : {&v, &x, &o, &grad_k, &grad_v, &grad_x, &grad_o, &grad_gain, &read_n_, &y_, &grad_z_last_})
            *p = arena.take(D * R);
        for (float** p : {&wide_, &wide2_, &grad_h_}) *p = arena.take(widest * R);
        for (float** p : {&read_rstd_, &end_gain_, &momentum_gain_}) *p = arena.take(R);
        for (float** p : {&gamma_, &square_, &square2_}) *p = arena.take(R * R);
        for (int l = 0; l < m.maps; l++) {
            const int in = m.map[l].in, out = m.map[l].out;
            for (float** p : {&a_[l], &h_[l], &grad_a_[l]}) *p = arena.take(in * R);
            for (float** p : {&delta_[l], &grad_delta_[l], &slope_[l], &curve_[l], &read_slope_[l], &base_[l],
                              &second_[l], &grad_y_[l], &grad_z_[l], &grad_u_[l]})
                *p = arena.take(out * R);
            for (float** p : {&delta_rows_[l], &grad_y_rows_[l], &grad_z_rows_[l]}) *p = arena.take(out * R);
            meets_[l] = arena.take(R * R);
        }
    }
    static size_t floats(const Memory& m) {
        return R * (11 * m.D + 3 * std::max(m.D, m.M) + m.maps * 16 * std::max(m.D, m.M) + 3 * R + m.maps * R) + 4096;
    }

    // The inner gradients at the anchor, of the keys in the tape (k given) and the values v.
    void keys(const float* anchor) {
        a_[0] = tape.k;
        for (int l = 0; l < m.maps; l++) {
            const bool last = l + 1 == m.maps;
            float* z = last ? y_ : tape.z[l];
            times<R>(anchor + m.map[l].weight, m.map[l].in, m.map[l].out, a_[l], z, bias_of(anchor, l));
            if (!last) gelu(z, m.M, a_[l + 1], slope_[l], nullptr);
        }
        if (m.has_norm) {
            normalise(y_, tape.n, tape.rstd);
            for (int d = 0; d < m.D; d++)
                each(d, [&](int i) {
                    store<VW>(tape.error + i, at(tape.n, i) * gain[d] + bias[d] - at(v, i) + at(tape.k, i));
                });
        } else {
            for_all(m.D, [&](int i) { store<VW>(tape.error + i, at(y_, i) - at(v, i)); });
        }
        last_delta();
        for (int l = m.maps - 2; l >= 0; l--) {
            times_transposed<R>(anchor + m.map[l + 1].weight, m.map[l + 1].out, m.M, delta_[l + 1], tape.u[l]);
            for_all(m.M, [&](int i) { store<VW>(delta_[l] + i, at(tape.u[l], i) * at(slope_[l], i)); });
        }
    }

    // W and S after the tile, from those before it; each may be in place. `second`: S, where it is the momentum, or the
    // anchor, which stays.
    void learn(const float* weights, float* to, const float* second, float* second_to, const Coefficients<R>& c) {
        c.gains(gamma_, end_gain_, momentum_gain_);
        if (c.has_second) {
            for (ptrdiff_t i = 0; i < m.size; i++) to[i] = c.end_decay * weights[i] + c.end_second * second[i];
            weights = to;
        } else if (c.has_decay) {
            for (ptrdiff_t i = 0; i < m.size; i++) to[i] = c.end_decay * weights[i];
            weights = to;
        }
        descend(weights, to, end_gain_);
        if (c.has_momentum) {
            for (ptrdiff_t i = 0; i < m.size; i++) second_to[i] = c.momentum_decay * second[i];
            descend(second_to, second_to, momentum_gain_);
        }
    }

    // o at the rows x. `weights`: what is read at, W of a local memory, or the anchor. LOCAL: reads see the tile's own
    // tokens, whose gradients `keys` has left here. KEEP: what the backward needs of it stays.
    template <bool LOCAL, bool KEEP>
    void read(const float* weights, const float* second, const Coefficients<R>& c) {
        if (LOCAL) c.gains(gamma_, end_gain_, momentum_gain_);
        const float* h = x;
        for (int l = 0; l < m.maps; l++) {
            const Map& map = m.map[l];
            const bool last = l + 1 == m.maps;
            float* y = KEEP ? base_[l] : wide_;
            times<R>(weights + map.weight, map.in, map.out, h, y, bias_of(weights, l));
            if (LOCAL) {
                float* to = KEEP ? wide_ : y;
                mix(map, second, l, h, y, to, c, KEEP);
                float* p = KEEP ? meets_[l] : square_;
                meet<R>(a_[l], map.in, h, p);
                const float one = map.bias >= 0 ? 1.0f : 0.0f;
                for (int i = 0; i < R * R; i += VW)
                    store<VW>(square2_ + i, (at(p, i) + one) * at(gamma_, i));
                spread<R, Into::subtract>(delta_[l], map.out, square2_, to);
                y = to;
            }
            if (!last) {
                gelu(y, m.M, h_[l + 1], KEEP ? read_slope_[l] : nullptr, nullptr);
                h = h_[l + 1];
            } else if (m.has_norm) {
                normalise(y, read_n_, read_rstd_);
                for (int d = 0; d < m.D; d++)
                    each(d, [&](int i) { store<VW>(o + i, at(x, i) + at(read_n_, i) * gain[d] + bias[d]); });
            } else {
                std::memcpy(o, y, sizeof(float) * m.D * R);
            }
        }
    }

    // What `keys` leaves besides the tape, made again from it, and φ''.
    void again() {
        a_[0] = tape.k;
        for (int l = 0; l + 1 < m.maps; l++) gelu(tape.z[l], m.M, a_[l + 1], slope_[l], curve_[l]);
        last_delta();
        for (int l = m.maps - 2; l >= 0; l--)
            for_all(m.M, [&](int i) { store<VW>(delta_[l] + i, at(tape.u[l], i) * at(slope_[l], i)); });
    }

    // Backward of `keys`, `read` and `learn` of a tile, from grad_o and the gradients of the state after it, which
    // turn into those of the state before it: `grad_weights` of W, `grad_second` of S, and what A gets is added to
    // `grad_anchor`, which may be the same as grad_weights where A = W. Called after `again`. LEARNS: not, if nobody wants
    // the state after the tile, whose gradients are zeros then.
    template <bool LOCAL>
    void backward(
        const float* weights, const float* anchor, const float* second, float* grad_weights, float* grad_anchor,
        float* grad_second, const Coefficients<R>& c, CoefficientGradients<R>& g, bool learns) {
        read<LOCAL, true>(LOCAL ? weights : anchor, second, c);
        c.gains(gamma_, end_gain_, momentum_gain_);
        std::memset(&g, 0, sizeof g);
        const int last = m.maps - 1;
        // 1. The output's norm.
        if (m.has_norm) {
            for (int d = 0; d < m.D; d++)
                each(d, [&](int i) {
                    store<VW>(grad_gain + i, at(grad_gain, i) + at(grad_o, i) * at(read_n_, i));
                    store<VW>(wide_ + i, at(grad_o, i) * gain[d]);
                });
            normalise_backward(read_n_, read_rstd_, wide_, grad_y_[last]);
        } else {
            std::memcpy(grad_y_[last], grad_o, sizeof(float) * m.D * R);
        }
        // 4. The state's updates.
        if (learns) {
            for (int l = 0; l < m.maps; l++)
                updates_backward(l, grad_weights, c.has_momentum ? grad_second : nullptr, g);
            states_backward(weights, second, grad_weights, grad_second, c, g);
        } else {
            for (int l = 0; l < m.maps; l++) {
                std::memset(grad_delta_[l], 0, sizeof(float) * m.map[l].out * R);
                std::memset(grad_a_[l], 0, sizeof(float) * m.map[l].in * R);
            }
        }
        // 2, 3. The reads, from the last map to the first.
        for (int l = last; l >= 0; l--) {
            read_backward<LOCAL>(l, LOCAL ? weights : anchor, second, grad_second, c, g);
            if (l > 0)
                for_all(m.M, [&](int i) {
                    store<VW>(grad_y_[l - 1] + i, at(grad_h_, i) * at(read_slope_[l - 1], i));
                });
        }
        const bool residual = m.has_norm;
        for_all(m.D, [&](int i) { store<VW>(grad_x + i, residual ? at(grad_h_, i) + at(grad_o, i) : at(grad_h_, i)); });
        if (!LOCAL && !learns) {  // nothing depends on the keys
            std::memset(grad_k, 0, sizeof(float) * m.D * R);
            std::memset(grad_v, 0, sizeof(float) * m.D * R);
            for (int l = 0; l < m.maps; l++) read_weights_backward(l, grad_anchor);
            return;
        }
        // 5. The hidden gradients.
        for (int l = 0; l < last; l++) {
            for_all(m.M, [&](int i) {
                const V grad = at(grad_delta_[l], i);
                store<VW>(grad_u_[l] + i, grad * at(slope_[l], i));
                store<VW>(grad_z_[l] + i, grad * at(tape.u[l], i) * at(curve_[l], i));
            });
            const Map& next = m.map[l + 1];
            times<R, Into::add>(anchor + next.weight, next.in, next.out, grad_u_[l], grad_delta_[l + 1]);
        }
        // 6. The second order of the norm; grad_v.
        error_backward();
        // 7. The outputs at the keys, from the last map to the first.
        for (int l = last; l > 0; l--) {
            times_transposed<R, Into::add>(anchor + m.map[l].weight, m.map[l].out, m.M, grad_z_[l], grad_a_[l]);
            for_all(m.M, [&](int i) {
                store<VW>(grad_z_[l - 1] + i, at(grad_z_[l - 1], i) + at(grad_a_[l], i) * at(slope_[l - 1], i));
            });
        }
        times_transposed<R, Into::add>(anchor + m.map[0].weight, m.map[0].out, m.D, grad_z_[0], grad_a_[0]);
        for_all(m.D, [&](int i) {
            store<VW>(grad_k + i, residual ? at(grad_a_[0], i) - at(grad_v, i) : at(grad_a_[0], i));
        });
        for (int l = 0; l < m.maps; l++) weights_backward(l, LOCAL ? grad_weights : grad_anchor, grad_anchor);
    }

  private:
    static TNT_INLINE V at(const float* p, int i) { return load<VW>(p + i); }
    template <class F> static TNT_INLINE void each(int feature, F f) {
        for (int v = 0; v < NV; v++) f(feature * R + v * VW);
    }
    template <class F> static TNT_INLINE void for_all(int features, F f) {
        for (int i = 0; i < features * R; i += VW) f(i);
    }
    const float* bias_of(const float* state, int l) const {
        return m.map[l].bias < 0 ? nullptr : state + m.map[l].bias;
    }

    // a = φ(z), φ' and φ''.
    static void gelu(const float* z, int features, float* value, float* slope, float* curve) {
        for_all(features, [&](int i) {
            const Gelu<VW> phi(at(z, i));
            store<VW>(value + i, phi.value);
            if (!slope) return;
            const V first = phi.slope();
            store<VW>(slope + i, first);
            if (curve) store<VW>(curve + i, phi.curve(first));
        });
    }

    // n = (y − mean) / sqrt(var + ε) over features.
    void normalise(const float* y, float* n, float* rstd) const {
        for (int v = 0; v < R; v += VW) {
            V mean{}, variance{};
            for (int d = 0; d < m.D; d++) mean += at(y, d * R + v);
            mean = mean * (1.0f / m.D);
            for (int d = 0; d < m.D; d++) {
                const V centred = at(y, d * R + v) - mean;
                variance += centred * centred;
            }
            V r = variance * (1.0f / m.D) + NORM_EPS;
            for (int i = 0; i < VW; i++) r[i] = 1.0f / std::sqrt(r[i]);
            store<VW>(rstd + v, r);
            for (int d = 0; d < m.D; d++) store<VW>(n + d * R + v, (at(y, d * R + v) - mean) * r);
        }
    }

    // J(r, n, g) = r (g − mean g − n mean(g ⊙ n)).
    void normalise_backward(const float* n, const float* rstd, const float* g, float* out) const {
        for (int v = 0; v < R; v += VW) {
            V mean{}, along{};
            for (int d = 0; d < m.D; d++) {
                mean += at(g, d * R + v);
                along += at(g, d * R + v) * at(n, d * R + v);
            }
            mean = mean * (1.0f / m.D);
            along = along * (1.0f / m.D);
            const V r = at(rstd, v);
            for (int d = 0; d < m.D; d++)
                store<VW>(out + d * R + v, r * (at(g, d * R + v) - mean - at(n, d * R + v) * along));
        }
    }

    // δ of the last map, from the error.
    void last_delta() {
        float* delta = delta_[m.maps - 1];
        if (m.has_norm) {
            for (int d = 0; d < m.D; d++) each(d, [&](int i) { store<VW>(wide_ + i, at(tape.error, i) * gain[d]); });
            normalise_backward(tape.n, tape.rstd, wide_, delta);
        } else {
            std::memcpy(delta, tape.error, sizeof(float) * m.D * R);
        }
    }

    // to = from − Σ_t gains[t] aᵀ δ of all maps.
    void descend(const float* from, float* to, const float* gains) {
        for (int l = 0; l < m.maps; l++) {
            const Map& map = m.map[l];
            scale_lanes<false>(delta_[l], map.out, gains, -1.0f, wide_);
            transpose<R>(wide_, map.out, R, delta_rows_[l]);
            add_outer<R, 1>(from + map.weight, to + map.weight, map.in, map.out, {a_[l]}, {delta_rows_[l]});
            if (map.bias < 0) continue;
            if (from != to) std::memcpy(to + map.bias, from + map.bias, sizeof(float) * map.out);
            add_rows(delta_rows_[l], map.out, to + map.bias);
        }
    }

    // out (+)= factor · lanes ⊙ x.
    template <bool ADD> static void scale_lanes(const float* x, int features, const float* lanes, float factor, float* out) {
        for (int v = 0; v < R; v += VW) {
            const V s = at(lanes, v) * factor;
            for (int f = 0; f < features; f++) {
                const V product = at(x, f * R + v) * s;
                store<VW>(out + f * R + v, ADD ? at(out, f * R + v) + product : product);
            }
        }
    }

    // out[lane] += factor Σ_f x y.
    static void add_dots(const float* x, const float* y, int features, float factor, float* out) {
        for (int v = 0; v < R; v += VW) {
            V sum{};
            for (int f = 0; f < features; f++) sum += at(x, f * R + v) * at(y, f * R + v);
            store<VW>(out + v, at(out, v) + factor * sum);
        }
    }

    // sums[n] += Σ_t rows[t][n].
    static void add_rows(const float* rows, int N, float* sums) {
        for (int n = 0; n < N; n += WIDTH) {
            Vector<WIDTH> sum = load<WIDTH>(sums + n);
            for (int t = 0; t < R; t++) sum += load<WIDTH>(rows + t * N + n);
            store<WIDTH>(sums + n, sum);
        }
    }

    // B (h W + b) + F (h S + s), the part of a read that does not see the tile's own tokens.
    void mix(
        const Map& map, const float* second, int l, const float* h, const float* base, float* to,
        const Coefficients<R>& c, bool keep) {
        if (c.has_decay)
            scale_lanes<false>(base, map.out, c.decay, 1.0f, to);
        else if (to != base)
            std::memcpy(to, base, sizeof(float) * map.out * R);
        if (c.has_second) {
            float* s = keep ? second_[l] : wide2_;
            times<R>(second + map.weight, map.in, map.out, h, s, bias_of(second, l));
            scale_lanes<true>(s, map.out, c.second, 1.0f, to);
        }
    }

    // Step 4 of one map: δ̄, ā and the gradients of γ and σ.
    void updates_backward(int l, const float* grad_weights, const float* grad_momentum, CoefficientGradients<R>& g) {
        const Map& map = m.map[l];
        times<R>(grad_weights + map.weight, map.in, map.out, a_[l], wide2_, bias_of(grad_weights, l));
        add_dots(delta_[l], wide2_, map.out, -1.0f, g.end_gain);
        scale_lanes<false>(wide2_, map.out, end_gain_, -1.0f, grad_delta_[l]);
        scale_lanes<false>(delta_[l], map.out, end_gain_, -1.0f, wide2_);
        times_transposed<R>(grad_weights + map.weight, map.out, map.in, wide2_, grad_a_[l]);
        if (!grad_momentum) return;
        times<R>(grad_momentum + map.weight, map.in, map.out, a_[l], wide2_, bias_of(grad_momentum, l));
        add_dots(delta_[l], wide2_, map.out, -1.0f, g.momentum_gain);
        scale_lanes<true>(wide2_, map.out, momentum_gain_, -1.0f, grad_delta_[l]);
        scale_lanes<false>(delta_[l], map.out, momentum_gain_, -1.0f, wide2_);
        times_transposed<R, Into::add>(grad_momentum + map.weight, map.out, map.in, wide2_, grad_a_[l]);
    }

    // Step 4, what does not touch the tokens.
    void states_backward(
        const float* weights, const float* second, float* grad_weights, float* grad_second, const Coefficients<R>& c,
        CoefficientGradients<R>& g) const {
        if (c.is_plain) return;
        if (c.has_decay || c.has_second) g.end_decay = inner(grad_weights, weights);
        if (c.has_second) g.end_second = inner(grad_weights, second);
        if (c.has_momentum) {
            g.momentum_decay = inner(grad_second, second);
            for (ptrdiff_t i = 0; i < m.size; i++) grad_second[i] *= c.momentum_decay;
        }
        if (c.has_second)
            for (ptrdiff_t i = 0; i < m.size; i++) grad_second[i] += c.end_second * grad_weights[i];
        if (c.end_decay != 1)
            for (ptrdiff_t i = 0; i < m.size; i++) grad_weights[i] *= c.end_decay;
    }

    float inner(const float* x, const float* y) const {
        Vector<WIDTH> sum{};
        for (ptrdiff_t i = 0; i < m.size; i += WIDTH) sum += load<WIDTH>(x + i) * load<WIDTH>(y + i);
        float total = 0;
        for (int i = 0; i < WIDTH; i++) total += sum[i];
        return total;
    }

    // Steps 2 and 3 of one map, without the gradients of its weight: h̄, and parts of δ̄, ā and Γ̄.
    template <bool LOCAL>
    void read_backward(
        int l, const float* weights, const float* second, float* grad_second, const Coefficients<R>& c,
        CoefficientGradients<R>& g) {
        const Map& map = m.map[l];
        const float* h = l == 0 ? x : h_[l];
        float* grad_y = grad_y_[l];
        if (!LOCAL) {
            times_transposed<R>(weights + map.weight, map.out, map.in, grad_y, grad_h_);
            return;
        }
        // R = −δ ȳ, [τ][t]; P and P ⊙ Γ.
        meet<R>(delta_[l], map.out, grad_y, square_);
        const float one = map.bias >= 0 ? 1.0f : 0.0f;
        for (int i = 0; i < R * R; i += VW) {
            const V r = -at(square_, i), p = at(meets_[l], i) + one;
            store<VW>(g.gamma + i, at(g.gamma, i) + r * p);
            store<VW>(square_ + i, r * at(gamma_, i));
            store<VW>(meets_[l] + i, p * at(gamma_, i));
        }
        spread<R, Into::fresh>(a_[l], map.in, square_, grad_h_);
        transpose<R>(square_, R, R, square2_);
        spread<R, Into::add>(h, map.in, square2_, grad_a_[l]);
        transpose<R>(meets_[l], R, R, square2_);
        spread<R, Into::subtract>(grad_y, map.out, square2_, grad_delta_[l]);
        if (c.has_second) {
            add_dots(grad_y, second_[l], map.out, 1.0f, g.second);
            scale_lanes<false>(grad_y, map.out, c.second, 1.0f, wide2_);
            times_transposed<R, Into::add>(second + map.weight, map.out, map.in, wide2_, grad_h_);
            transpose<R>(wide2_, map.out, R, delta_rows_[l]);
            add_outer<R, 1>(grad_second + map.weight, map.in, map.out, {h}, {delta_rows_[l]});
            if (map.bias >= 0) add_rows(delta_rows_[l], map.out, grad_second + map.bias);
        }
        if (c.has_decay) {
            add_dots(grad_y, base_[l], map.out, 1.0f, g.decay);
            scale_lanes<false>(grad_y, map.out, c.decay, 1.0f, grad_y);
        }
        times_transposed<R, Into::add>(weights + map.weight, map.out, map.in, grad_y, grad_h_);
    }

    // Step 6: from δ̄ of the last map, grad_v and the gradient of its output.
    void error_backward() {
        const int last = m.maps - 1;
        const float* q = grad_delta_[last];
        float* grad_z = grad_z_[last];
        if (!m.has_norm) {
            for_all(m.D, [&](int i) {
                store<VW>(grad_z + i, at(q, i));
                store<VW>(grad_v + i, -at(q, i));
            });
            return;
        }
        const float *n = tape.n, *delta = delta_[last];
        normalise_backward(n, tape.rstd, q, wide_);  // Ḡz
        for (int v = 0; v < R; v += VW) {
            const V r = at(tape.rstd, v);
            V gz_n{}, q_n{}, q_delta{};
            for (int d = 0; d < m.D; d++) {
                const int i = d * R + v;
                gz_n += at(tape.error, i) * gain[d] * at(n, i);
                q_n += at(q, i) * at(n, i);
                q_delta += at(q, i) * at(delta, i);
            }
            gz_n = gz_n * (1.0f / m.D), q_n = q_n * (1.0f / m.D), q_delta = q_delta * r * (1.0f / m.D);
            for (int d = 0; d < m.D; d++) {
                const int i = d * R + v;
                const V error = at(tape.error, i), grad_gz = at(wide_, i), grad_error = grad_gz * gain[d];
                store<VW>(grad_gain + i, at(grad_gain, i) + grad_gz * error + grad_error * at(n, i));
                store<VW>(grad_v + i, -grad_error);
                store<VW>(y_ + i, grad_error * gain[d] - r * (at(q, i) * gz_n + error * gain[d] * q_n));  // N̄
                store<VW>(grad_z_last_ + i, at(n, i) * q_delta);
            }
        }
        normalise_backward(n, tape.rstd, y_, grad_z);
        for_all(m.D, [&](int i) { store<VW>(grad_z + i, at(grad_z, i) - at(grad_z_last_, i)); });
    }

    // W̄ += hᵀ (B ȳ) of one map.
    void read_weights_backward(int l, float* grad_read) {
        const Map& map = m.map[l];
        transpose<R>(grad_y_[l], map.out, R, grad_y_rows_[l]);
        add_outer<R, 1>(grad_read + map.weight, map.in, map.out, {l == 0 ? x : h_[l]}, {grad_y_rows_[l]});
        if (map.bias >= 0) add_rows(grad_y_rows_[l], map.out, grad_read + map.bias);
    }

    // The same and Ā += aᵀ z̄ + ūᵀ δ, together where both are the same.
    void weights_backward(int l, float* grad_read, float* grad_anchor) {
        const Map& map = m.map[l];
        const float *h = l == 0 ? x : h_[l], *u = l > 0 ? grad_u_[l - 1] : nullptr;
        const float *by_y = grad_y_rows_[l], *by_z = grad_z_rows_[l], *by_u = delta_rows_[l];
        float* anchor = grad_anchor + map.weight;
        transpose<R>(grad_z_[l], map.out, R, grad_z_rows_[l]);
        if (u) transpose<R>(delta_[l], map.out, R, delta_rows_[l]);
        if (map.bias >= 0) add_rows(by_z, map.out, grad_anchor + map.bias);
        if (grad_read != grad_anchor) {
            read_weights_backward(l, grad_read);
            if (u)
                add_outer<R, 2>(anchor, map.in, map.out, {a_[l], u}, {by_z, by_u});
            else
                add_outer<R, 1>(anchor, map.in, map.out, {a_[l]}, {by_z});
            return;
        }
        transpose<R>(grad_y_[l], map.out, R, grad_y_rows_[l]);
        if (map.bias >= 0) add_rows(by_y, map.out, grad_read + map.bias);
        if (u)
            add_outer<R, 3>(anchor, map.in, map.out, {h, a_[l], u}, {by_y, by_z, by_u});
        else
            add_outer<R, 2>(anchor, map.in, map.out, {h, a_[l]}, {by_y, by_z});
    }

    float *read_n_, *read_rstd_, *y_, *grad_z_last_, *wide_, *wide2_, *grad_h_, *end_gain_, *momentum_gain_;
    float *gamma_, *square_, *square2_;  // [τ][t]
    float *a_[MAX_MAPS], *h_[MAX_MAPS], *delta_[MAX_MAPS], *slope_[MAX_MAPS], *curve_[MAX_MAPS], *read_slope_[MAX_MAPS];
    float *base_[MAX_MAPS], *second_[MAX_MAPS], *meets_[MAX_MAPS], *grad_a_[MAX_MAPS], *grad_delta_[MAX_MAPS];
    float *grad_y_[MAX_MAPS], *grad_z_[MAX_MAPS], *grad_u_[MAX_MAPS];
    float *delta_rows_[MAX_MAPS], *grad_y_rows_[MAX_MAPS], *grad_z_rows_[MAX_MAPS];  // token by token
};

}  // namespace tnt
