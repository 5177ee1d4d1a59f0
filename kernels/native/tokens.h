// Tokens as the callers hold them: rows of float32 or bfloat16 numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace tnt {

inline float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t round_to_bfloat16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `size` numbers from place `at` on.
inline void read_numbers(const void* tokens, bool is_bfloat16, int64_t at, int size, float* out) {
    if (is_bfloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(tokens) + at;
        for (int i = 0; i < size; i++) out[i] = widen(x[i]);
    } else {
        std::memcpy(out, static_cast<const float*>(tokens) + at, sizeof(float) * size);
    }
}
inline void write_numbers(const float* x, bool is_bfloat16, int64_t at, int size, void* tokens) {
    if (is_bfloat16) {
        uint16_t* out = static_cast<uint16_t*>(tokens) + at;
        for (int i = 0; i < size; i++) out[i] = round_to_bfloat16(x[i]);
    } else {
        std::memcpy(static_cast<float*>(tokens) + at, x, sizeof(float) * size);
    }
}

}  // namespace tnt
