// Rows of numbers: what a step of one token computes with, where there is no tile to fill.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formulas.h"
#include "tokens.h"

namespace tnt::decode {

constexpr int64_t ROWS_AT_ONCE = 4;

// Rows end at a whole vector.
inline int64_t row_width(int64_t count) { return (count + 15) / 16 * 16; }

// What a pointer whose type is known at run time points to; the numbers are those of step.py.
enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 0x3ff;
    if (exponent == 0) {  // zero and subnormal numbers, units of 2^−24
        const float value = float(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// `count` numbers of a type from the `first` on.
inline void widen(float* target, const void* source, int64_t type, int64_t first, int64_t count) {
    if (type == FLOAT32) {
        std::memcpy(target, static_cast<const float*>(source) + first, size_t(count) * sizeof(float));
        return;
    }
    const uint16_t* bits = static_cast<const uint16_t*>(source) + first;
    for (int64_t i = 0; i < count; ++i) {
        target[i] = type == FLOAT16 ? half_to_float(bits[i]) : tnt::widen(bits[i]);
    }
}

// gelu in place, and its slope if there is a place for it. Rows end at a whole vector.
inline void gelu(float* z, float* slope, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Gelu<WIDTH> phi(tnt::load<WIDTH>(z + i));
        if (slope) store<WIDTH>(slope + i, phi.slope());
        store<WIDTH>(z + i, phi.value);
    }
}

inline void silu(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Vector<WIDTH> z = tnt::load<WIDTH>(x + i);
        store<WIDTH>(x + i, z / (1.0f + tnt::exp<WIDTH>(-z)));
    }
}

inline float dot(const float* __restrict a, const float* __restrict b, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

// x/‖x‖, or x/smallest where that is longer; a zero row stays zero.
inline void make_unit(float* __restrict x, int64_t count, float smallest = 0.0f) {
    const float length = std::sqrt(dot(x, x, count));
    const float scale = length == 0.0f ? 0.0f : 1.0f / (length < smallest ? smallest : length);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

// x := LN(x) without weight and bias; returns 1/deviation.
inline float standardise(float* __restrict x, int64_t count) {
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    const float mean = sum / float(count);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < count; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float rstd = 1.0f / std::sqrt(square / float(count) + NORM_EPS);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = (x[i] - mean) * rstd;
    return rstd;
}

// y := x W for W [inputs, outputs].
inline void times(
    const float* __restrict x, const float* __restrict w, float* __restrict y, int64_t inputs, int64_t outputs) {
    std::memset(y, 0, size_t(outputs) * sizeof(float));
    int64_t i = 0;
    for (; i + ROWS_AT_ONCE <= inputs; i += ROWS_AT_ONCE) {
        const float* __restrict w0 = w + i * outputs;
        const float* __restrict w1 = w0 + outputs;
        const float* __restrict w2 = w1 + outputs;
        const float* __restrict w3 = w2 + outputs;
        const float x0 = x[i], x1 = x[i + 1], x2 = x[i + 2], x3 = x[i + 3];
#pragma omp simd
        for (int64_t o = 0; o < outputs; ++o) y[o] += (x0 * w0[o] + x1 * w1[o]) + (x2 * w2[o] + x3 * w3[o]);
    }
    for (; i < inputs; ++i) {
        const float* __restrict row = w + i * outputs;
#pragma omp simd
        for (int64_t o = 0; o < outputs; ++o) y[o] += x[i] * row[o];
    }
}

}  // namespace tnt::decode
