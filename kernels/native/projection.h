// The Q-K projection of one head, tile after tile: x = M q with M = Σ k kᵀ/‖k‖² (kernels/README.md, "Q-K projection").
#pragma once

#include <utility>

#include "tile.h"

namespace tnt {

// 1/‖x‖ of each token, 0 for a zero one.
template <int R> inline void inverse_norms(const float* x, int D, float* out) {
    constexpr int VW = lane_width<R>;
    for (int v = 0; v < R; v += VW) {
        Vector<VW> square{};
        for (int d = 0; d < D; d++) square += load<VW>(x + d * R + v) * load<VW>(x + d * R + v);
        for (int i = 0; i < VW; i++) out[v + i] = square[i] == 0 ? 0.0f : 1.0f / std::sqrt(square[i]);
    }
}
// out = lanes ⊙ x.
template <int R> inline void scale_tokens(const float* x, int D, const float* lanes, float* out) {
    constexpr int VW = lane_width<R>;
    for (int v = 0; v < R; v += VW) {
        const Vector<VW> s = load<VW>(lanes + v);
        for (int d = 0; d < D; d++) store<VW>(out + d * R + v, load<VW>(x + d * R + v) * s);
    }
}
// grad of x from that of u = x/‖x‖, given u and 1/‖x‖: (ū − u (u·ū))/‖x‖. May be in place.
template <int R> inline void unit_backward(const float* u, const float* inverse, const float* grad, int D, float* out) {
    constexpr int VW = lane_width<R>;
    for (int v = 0; v < R; v += VW) {
        Vector<VW> along{};
        for (int d = 0; d < D; d++) along += load<VW>(u + d * R + v) * load<VW>(grad + d * R + v);
        const Vector<VW> s = load<VW>(inverse + v);
        for (int d = 0; d < D; d++)
            store<VW>(out + d * R + v, s * (load<VW>(grad + d * R + v) - along * load<VW>(u + d * R + v)));
    }
}

template <int R> class Projection {
  public:
    const int D;
    float *unit, *inverse;  // k/‖k‖ and 1/‖k‖, of the tile at hand

    Projection(int dim, Arena& arena) : D(dim) {
        for (float** p : {&unit, &rows_, &sum_}) *p = arena.take(D * R);
        for (float** p : {&meets_, &turned_}) *p = arena.take(R * R);
        for (float** p : {&inverse, &length_}) *p = arena.take(R);
    }
    static size_t floats(int D) { return R * (3 * D + 2 * R + 2) + 256; }

    void keys(const float* k) {
        inverse_norms<R>(k, D, inverse);
        scale_tokens<R>(k, D, inverse, unit);
    }
    // out = q M + tril(q k̂ᵀ) k̂. The same maps x̄ to q̄, since M is symmetric.
    void project(const float* matrix, const float* q, float* out) {
        meet<R>(unit, D, q, meets_);
        mask(meets_);
        times<R>(matrix, D, D, q, out);
        spread<R, Into::add>(unit, D, meets_, out);
    }
    // x/‖x‖ in place, and its backward in place, given the normalised rows.
    void normalise(float* x) {
        inverse_norms<R>(x, D, length_);
        scale_tokens<R>(x, D, length_, x);
    }
    void normalise_backward(const float* x, float* grad) const { unit_backward<R>(x, length_, grad, D, grad); }
    // M += k̂ᵀ k̂.
    void learn(float* matrix) {
        transpose<R>(unit, D, R, rows_);
        add_outer<R, 1>(matrix, D, D, {unit}, {rows_});
    }
    // grad_k += …, and the gradient of M after the tile turns into that of M before it.
    void keys_backward(const float* q, const float* grad_x, float* grad_matrix, float* grad_k) {
        times<R>(grad_matrix, D, D, unit, sum_);
        times_transposed<R, Into::add>(grad_matrix, D, D, unit, sum_);
        for (const auto& [one, other] : {std::pair{q, grad_x}, std::pair{grad_x, q}}) {
            meet<R>(unit, D, one, meets_);
            mask(meets_);
            transpose<R>(meets_, R, R, turned_);
            spread<R, Into::add>(other, D, turned_, sum_);
        }
        unit_backward<R>(unit, inverse, sum_, D, sum_);
        for (int i = 0; i < D * R; i++) grad_k[i] += sum_[i];
        transpose<R>(grad_x, D, R, rows_);
        add_outer<R, 1>(grad_matrix, D, D, {q}, {rows_});
    }

  private:
    // Reads at t see tokens τ ≤ t.
    static void mask(float* meets) {
        for (int j = 1; j < R; j++)
            for (int t = 0; t < j; t++) meets[j * R + t] = 0;
    }

    float *rows_, *sum_, *meets_, *turned_, *length_;
};

}  // namespace tnt
