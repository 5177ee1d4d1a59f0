// From the projections of q, k and v to what the memories get: a causal depthwise convolution inside each sequence,
// silu, and for q and k unit length of every head. One pass over the tokens each way; the torch operations make fifteen.
//
//   y_t = Σ_j w[:, j] ⊙ x_{t − K + 1 + j},   a = y σ(y),   out = a / max(‖a‖, ε) per head (q, k), or a (v)

#include <algorithm>
#include <cmath>
#include <vector>

#include "tokens.h"
#include "vector.h"

namespace tnt {

constexpr float UNIT_EPS = 1e-6f;
constexpr int64_t BLOCK = 32;  // tokens that one thread takes at a time

struct QkvCall {
    const void *x[3], *grad_out[3];  // q, k, v: [tokens, channels], float32 or bfloat16
    void *out[3], *grad_x[3];        //
    const float* weight;             // [3 channels, K]
    float* grad_weight;              // [blocks, 3 channels, K]
    const int64_t* boundaries;       // [rows + 1]
    int64_t rows, channels, head_dim, taps, is_bfloat16, threads;
};

// The convolution of one of the three, over a block of tokens of a sequence.
class Part {
  public:
    Part(const QkvCall& call, int which)
        : c_(call), which_(which), C_(int(call.channels)), K_(int(call.taps)), x_((BLOCK + 2 * K_) * C_),
          y_((BLOCK + K_) * C_), grad_((BLOCK + K_) * C_), taps_(C_ * K_), grad_taps_(C_ * K_) {
        for (int c = 0; c < C_; c++)
            for (int j = 0; j < K_; j++) taps_[j * C_ + c] = c_.weight[(which * C_ + c) * K_ + j];
    }

    // Tokens first … last − 1 of the sequence that begins at token `begin`.
    void forward(int64_t begin, int64_t first, int64_t last) {
        convolve(begin, first, last);
        for (int64_t t = 0; t < last - first; t++) {
            float* y = &y_[t * C_];
            for (int c = 0; c < C_; c += WIDTH) {
                const Vector<WIDTH> v = load<WIDTH>(y + c);
                tnt::store<WIDTH>(y + c, v / (1.0f + exp<WIDTH>(-v)));
            }
            if (which_ < 2)
                for (int h = 0; h < C_; h += c_.head_dim) {
                    const float scale = 1 / std::max(norm(y + h), UNIT_EPS);
                    for (int d = 0; d < c_.head_dim; d++) y[h + d] *= scale;
                }
            write_numbers(y, c_.is_bfloat16, (first + t) * C_, C_, c_.out[which_]);
        }
    }

    // Gradients of x at these tokens, and what the taps get from them as places that are written to. What the taps'
    // gradients need of the K − 1 tokens behind is done again.
    void backward(int64_t begin, int64_t end, int64_t first, int64_t last, float* grad_weight) {
        const int64_t stop = std::min(end, last + K_ - 1);
        convolve(begin, first, stop);
        for (int64_t t = 0; t < stop - first; t++) {
            float *y = &y_[t * C_], *grad = &grad_[t * C_];
            read_numbers(c_.grad_out[which_], c_.is_bfloat16, (first + t) * C_, C_, grad);
            for (int h = 0; h < C_; h += c_.head_dim) head_backward(y + h, grad + h);
        }
        for (int j = 0; j < K_; j++)
            for (int c = 0; c < C_; c += WIDTH) {
                Vector<WIDTH> sum{};
                for (int64_t t = 0; t < last - first; t++)
                    sum += load<WIDTH>(&grad_[t * C_ + c]) * load<WIDTH>(&x_[(t + j) * C_ + c]);
                tnt::store<WIDTH>(&grad_taps_[j * C_ + c], sum);
            }
        for (int c = 0; c < C_; c++)
            for (int j = 0; j < K_; j++) grad_weight[(which_ * C_ + c) * K_ + j] = grad_taps_[j * C_ + c];
        for (int64_t t = 0; t < last - first; t++) {
            float* out = &y_[0];
            const int from = int(std::max<int64_t>(0, t + K_ - (stop - first)));  // the first tap with a reader
            for (int c = 0; c < C_; c += WIDTH) {
                Vector<WIDTH> sum{};
                for (int j = from; j < K_; j++)
                    sum += load<WIDTH>(&taps_[j * C_ + c]) * load<WIDTH>(&grad_[(t + K_ - 1 - j) * C_ + c]);
                tnt::store<WIDTH>(out + c, sum);
            }
            write_numbers(out, c_.is_bfloat16, (first + t) * C_, C_, c_.grad_x[which_]);
        }
    }

  private:
    float norm(const float* a) const {
        float square = 0;
        for (int d = 0; d < c_.head_dim; d += WIDTH) {
            const Vector<WIDTH> v = load<WIDTH>(a + d), s = v * v;
            for (int i = 0; i < WIDTH; i++) square += s[i];
        }
        return std::sqrt(square);
    }

    // The gradient of y from that of the output, in place.
    void head_backward(const float* y, float* grad) {
        const int D = int(c_.head_dim);
        float sigmoid[512], a[512];
        Vector<WIDTH> square{}, along{};
        for (int d = 0; d < D; d += WIDTH) {
            const Vector<WIDTH> v = load<WIDTH>(y + d), s = 1.0f / (1.0f + exp<WIDTH>(-v)), value = v * s;
            tnt::store<WIDTH>(sigmoid + d, s);
            tnt::store<WIDTH>(a + d, value);
            square += value * value;
            along += value * load<WIDTH>(grad + d);
        }
        float scale = 1, slope = 0;
        if (which_ < 2) {
            float length = 0, dot = 0;
            for (int i = 0; i < WIDTH; i++) length += square[i], dot += along[i];
            length = std::sqrt(length);
            scale = 1 / std::max(length, UNIT_EPS);
            slope = length > UNIT_EPS ? dot * scale * scale : 0;
        }
        for (int d = 0; d < D; d += WIDTH) {
            const Vector<WIDTH> s = load<WIDTH>(sigmoid + d), value = load<WIDTH>(a + d);
            const Vector<WIDTH> grad_a = scale * (load<WIDTH>(grad + d) - slope * value);
            tnt::store<WIDTH>(grad + d, grad_a * (s + value * (1.0f - s)));
        }
    }

    // x_: the K − 1 tokens before, and these; y_: the convolution at these.
    void convolve(int64_t begin, int64_t first, int64_t last) {
        for (int64_t i = 0; i < last - first + K_ - 1; i++) {
            const int64_t token = first - (K_ - 1) + i;
            if (token < begin)
                std::fill(&x_[i * C_], &x_[i * C_] + C_, 0.0f);
            else
                read_numbers(c_.x[which_], c_.is_bfloat16, token * C_, C_, &x_[i * C_]);
        }
        for (int64_t t = 0; t < last - first; t++) {
            for (int c = 0; c < C_; c += WIDTH) {
                Vector<WIDTH> sum{};
                for (int j = 0; j < K_; j++) sum += load<WIDTH>(&taps_[j * C_ + c]) * load<WIDTH>(&x_[(t + j) * C_ + c]);
                tnt::store<WIDTH>(&y_[t * C_ + c], sum);
            }
        }
    }

    const QkvCall& c_;
    const int which_, C_, K_;
    std::vector<float> x_, y_, grad_, taps_, grad_taps_;
};

struct Block {
    int64_t begin, end, first, last;
};

static std::vector<Block> blocks_of(const QkvCall& c) {
    std::vector<Block> blocks;
    for (int64_t row = 0; row < c.rows; row++) {
        const int64_t begin = c.boundaries[row], end = c.boundaries[row + 1];
        for (int64_t t = begin; t < end; t += BLOCK) blocks.push_back({begin, end, t, std::min(end, t + BLOCK)});
    }
    return blocks;
}

template <bool BACKWARD> static void run(const QkvCall& c) {
    const std::vector<Block> blocks = blocks_of(c);
    const int64_t count = int64_t(blocks.size());
#pragma omp parallel num_threads(int(std::max<int64_t>(1, std::min(c.threads, count))))
    {
        Part parts[] = {Part(c, 0), Part(c, 1), Part(c, 2)};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++)
            for (Part& part : parts) {
                const Block& b = blocks[i];
                if (BACKWARD)
                    part.backward(b.begin, b.end, b.first, b.last, c.grad_weight + i * 3 * c.channels * c.taps);
                else
                    part.forward(b.begin, b.first, b.last);
            }
    }
}

}  // namespace tnt

#define TNT_EXPORT extern "C" __attribute__((visibility("default")))

TNT_EXPORT int64_t tnt_qkv_blocks(const tnt::QkvCall* call) {
    return int64_t(tnt::blocks_of(*call).size());
}
TNT_EXPORT void tnt_qkv_forward(const tnt::QkvCall* call) {
    tnt::run<false>(*call);
}
TNT_EXPORT void tnt_qkv_backward(const tnt::QkvCall* call) {
    tnt::run<true>(*call);
}
