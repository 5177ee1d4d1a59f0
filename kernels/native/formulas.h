// What a memory is made of besides its products, for tiles and for single tokens.
#pragma once

#include "vector.h"

namespace tnt {

constexpr float NORM_EPS = 1e-6f;  // of the residual norm

// gelu in its tanh form, z σ(s) with s = A1 z + A3 z³, and its derivatives.
template <int W> struct Gelu {
    static constexpr float A1 = 1.5957691216057308f, A3 = A1 * 0.044715f;
    Vector<W> square, sigmoid, value;

    explicit TNT_INLINE Gelu(Vector<W> z)
        : square(z * z), sigmoid(1.0f / (1.0f + exp<W>(-z * (A1 + A3 * square)))), value(z * sigmoid) {}
    TNT_INLINE Vector<W> slope_of_s() const { return A1 + (3 * A3) * square; }
    TNT_INLINE Vector<W> slope() const { return sigmoid + value * (1.0f - sigmoid) * slope_of_s(); }
    TNT_INLINE Vector<W> curve(Vector<W> slope) const {
        return sigmoid * (1.0f - sigmoid) * (2.0f * A1 + (12 * A3) * square) +
               (slope - sigmoid) * slope_of_s() * (1.0f - 2.0f * sigmoid);
    }
};

}  // namespace tnt
