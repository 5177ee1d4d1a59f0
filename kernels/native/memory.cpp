// A memory read over segments: every (segment, head) is walked by one thread, tile after tile, with its state in the
// cache. The backward keeps the state before every `interval`-th chunk and walks a group of chunks again from there.
// Nothing is summed across items here, so results do not depend on the number of threads.

#include <memory>
#include <vector>

#include "coefficients.h"
#include "projection.h"
#include "tile.h"
#include "tokens.h"

namespace tnt {

enum ProjectionRule { NONE = 0, SHARD = 1, CHUNK = 2 };

// The arguments of a call; `reader.py` has the same fields in the same order. Shapes: S segments, H heads, P numbers of
// packed fast weights; null where there is none.
struct Call {
    const void *q, *k, *v, *grad_o;                   // [tokens, H, D] float32, or bfloat16
    void *o, *grad_q, *grad_k, *grad_v;               //
    const float *lr, *momentum, *decay;               // [tokens, H]
    const float* scale;                               // [chunk_size]
    const float *gain, *bias;                         // [H, D]
    const float *weights, *anchor, *momentum_state;   // [rows, H, P], what segments start from
    const float* projection;                          // [rows, H, D, D]
    const int64_t* segments;                          // [S, 5]: start, count, offset, source, end
    float *end_weights, *end_anchor, *end_momentum;   // [ends, H, P]
    float* end_projection;                            // [ends, H, D, D]
    float *kept_weights, *kept_momentum;              // [groups - 1, S, H, P]
    float* kept_projection;                           // [groups - 1, S, H, D, D]
    float *grad_lr, *grad_momentum, *grad_decay;      // [tokens, H]
    float* grad_scale;                                // [S, H, chunk_size], zeros at first
    float* grad_gain;                                 // [S, H, D]
    float *carry_weights, *carry_anchor, *carry_momentum;  // [S, H, P], gradients of the state after → before a segment
    float* carry_projection;                          // [S, H, D, D]
    int64_t S, H, D, M, maps, biases, chunk_size, rule, is_global, normalize, interval, is_bfloat16, rows, threads;
};

// Memory that a thread keeps from call to call.
static float* workspace(size_t floats) {
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local size_t size = 0;
    if (size < floats) {
        memory.reset();
        memory.reset(new float[floats]);
        size = floats;
    }
    return memory.get();
}

// Some tokens of a segment that share a chunk.
struct Span {
    int64_t first, place;  // token in the segment, and its place in its chunk
    int n;
};

template <int R> class Walk {
  public:
    Walk(const Call& call, const Memory& memory, float* room)
        : c_(call), m_(memory), arena_(room), tile_(memory, arena_), projection_(memory.D, arena_) {
        for (float** p : {&weights_, &anchor_, &momentum_}) *p = arena_.take(m_.size);
        matrix_ = arena_.take(m_.D * m_.D);
        q_ = arena_.take(m_.D * R), rows_ = arena_.take(m_.D * R);
        tape_ = KeyTape<R>(m_, arena_);
        rule_ = {c_.momentum != nullptr, c_.decay != nullptr, c_.scale != nullptr};
    }
    static size_t floats(const Memory& m) {
        return Tile<R>::floats(m) + Projection<R>::floats(m.D) + KeyTape<R>::floats(m) + 3 * m.size + m.D * m.D +
               2 * m.D * R + 256;
    }
    // Of the states and tapes of one group of chunks.
    static size_t trace_floats(const Call& c, const Memory& m) {
        const size_t tiles = c.interval * ((c.chunk_size + R - 1) / R) + 1;
        return tiles * (2 * m.size + m.D * m.D + KeyTape<R>::floats(m) + 256);
    }

    void forward(int64_t segment, int64_t head) {
        begin(segment, head);
        tile_.tape = tape_;
        const Start start = start_of(0);
        std::memcpy(weights_, start.weights, sizeof(float) * m_.size);
        if (start.anchor) std::memcpy(anchor_, start.anchor, sizeof(float) * m_.size);
        if (start.momentum) std::memcpy(momentum_, start.momentum, sizeof(float) * m_.size);
        if (start.matrix) std::memcpy(matrix_, start.matrix, sizeof(float) * m_.D * m_.D);
        for (int64_t i = 0; i < count_;) {
            const Span span = span_at(i, count_);
            if (span.place == 0) {
                const int64_t chunk = (offset_ + i) / c_.chunk_size;
                if (c_.interval && chunk > 0 && chunk % c_.interval == 0) keep(chunk / c_.interval - 1);
                begin_chunk();
            }
            const bool learns = learns_at(span), anchored = span.place > 0;
            load(c_.q, span, q_);
            const float* at = c_.is_global ? anchor_of(anchored) : weights_;
            if (c_.rule) {
                load(c_.k, span, tile_.tape.k);
                read_through_projection(matrix_);
                projection_.learn(matrix_);
            } else {
                std::memcpy(tile_.x, q_, sizeof(float) * m_.D * R);
            }
            coefficients_of(span, anchored);
            if (learns || !c_.is_global) {
                if (!c_.rule) load(c_.k, span, tile_.tape.k);
                load(c_.v, span, tile_.v);
                tile_.keys(anchor_of(anchored));
            }
            const float* second = second_of(anchored);
            if (c_.is_global)
                tile_.template read<false, false>(at, second, coefficients_);
            else
                tile_.template read<true, false>(at, second, coefficients_);
            store(tile_.o, span, c_.o);
            if (learns) tile_.learn(weights_, weights_, second, momentum_, coefficients_);
            i += span.n;
        }
        finish();
    }

    void backward(int64_t segment, int64_t head, float* trace) {
        begin(segment, head);
        const int64_t place = item() * m_.size, square = item() * m_.D * m_.D;
        grad_weights_ = c_.carry_weights + place;
        grad_anchor_ = c_.carry_anchor + place;
        grad_momentum_ = c_.carry_momentum ? c_.carry_momentum + place : nullptr;
        grad_matrix_ = c_.carry_projection ? c_.carry_projection + square : nullptr;
        if ((offset_ + count_) % c_.chunk_size == 0) {
            absorb_anchor();
            if (c_.rule == CHUNK) std::memset(grad_matrix_, 0, sizeof(float) * m_.D * m_.D);
        }
        std::memset(tile_.grad_gain, 0, sizeof(float) * m_.D * R);
        const int64_t length = c_.interval * c_.chunk_size;
        for (int64_t group = (offset_ + count_ + length - 1) / length - 1; group >= 0; group--) {
            walk_again(group, trace);
            for (size_t i = steps_.size(); i-- > 0;) step_backward(steps_[i]);
        }
        if (!c_.grad_gain) return;
        for (int d = 0; d < m_.D; d++) {
            float sum = 0;
            for (int t = 0; t < R; t++) sum += tile_.grad_gain[d * R + t];
            c_.grad_gain[item() * m_.D + d] = sum;
        }
    }

  private:
    // A tile on the way back, with the states before it.
    struct Step {
        Span span;
        const float *weights, *anchor, *momentum, *matrix;
        KeyTape<R> tape;
    };

    int64_t item() const { return segment_ * c_.H + head_; }

    void begin(int64_t segment, int64_t head) {
        const int64_t* s = c_.segments + 5 * segment;
        segment_ = segment, head_ = head;
        start_ = s[0], count_ = s[1], offset_ = s[2], source_ = s[3], end_ = s[4];
        tile_.gain = c_.gain ? c_.gain + head * m_.D : nullptr;
        tile_.bias = c_.bias ? c_.bias + head * m_.D : nullptr;
    }

    Span span_at(int64_t i, int64_t stop) const {
        const int64_t place = (offset_ + i) % c_.chunk_size;
        return {i, place, int(std::min({int64_t(R), c_.chunk_size - place, stop - i}))};
    }

    // Whether anybody reads the state after a tile: what comes behind it in this segment, or the caller.
    bool learns_at(const Span& span) const {
        const int64_t behind = c_.is_global ? span.first - span.place + c_.chunk_size : span.first + span.n;
        return end_ >= 0 || behind < count_;
    }

    // The state before a group of chunks, where it lies.
    struct Start {
        const float *weights, *anchor, *momentum, *matrix;
    };
    Start start_of(int64_t group) const {
        const int64_t row = source_ * c_.H + head_, kept = (group - 1) * c_.S * c_.H + item();
        auto at = [](const float* states, int64_t index, int64_t size) { return states ? states + index * size : nullptr; };
        const int64_t square = m_.D * m_.D;
        if (group == 0)
            return {at(c_.weights, row, m_.size), at(c_.anchor, row, m_.size), at(c_.momentum_state, row, m_.size),
                    at(c_.projection, row, square)};
        return {at(c_.kept_weights, kept, m_.size), nullptr, at(c_.kept_momentum, kept, m_.size),
                at(c_.kept_projection, kept, square)};
    }

    void keep(int64_t index) {
        const int64_t place = index * c_.S * c_.H + item();
        std::memcpy(c_.kept_weights + place * m_.size, weights_, sizeof(float) * m_.size);
        if (rule_.momentum) std::memcpy(c_.kept_momentum + place * m_.size, momentum_, sizeof(float) * m_.size);
        if (c_.rule)
            std::memcpy(c_.kept_projection + place * m_.D * m_.D, matrix_, sizeof(float) * m_.D * m_.D);
    }

    void begin_chunk() {
        if (c_.anchor || end_ >= 0) std::memcpy(anchor_, weights_, sizeof(float) * m_.size);
        if (c_.rule == CHUNK) std::memset(matrix_, 0, sizeof(float) * m_.D * m_.D);
    }

    float* anchor_of(bool anchored) { return anchored || (c_.is_global && c_.anchor) ? anchor_ : weights_; }
    float* second_of(bool anchored) { return rule_.momentum ? momentum_ : rule_.scale && anchored ? anchor_ : nullptr; }

    void finish() {
        if (end_ < 0) return;
        const int64_t place = end_ * c_.H + head_;
        const size_t state = sizeof(float) * m_.size;
        const bool aligned = (offset_ + count_) % c_.chunk_size == 0;
        std::memcpy(c_.end_weights + place * m_.size, weights_, state);
        std::memcpy(c_.end_anchor + place * m_.size, aligned ? weights_ : anchor_, state);
        if (rule_.momentum) std::memcpy(c_.end_momentum + place * m_.size, momentum_, state);
        if (!c_.rule) return;
        float* out = c_.end_projection + place * m_.D * m_.D;
        if (aligned && c_.rule == CHUNK)
            std::memset(out, 0, sizeof(float) * m_.D * m_.D);
        else
            std::memcpy(out, matrix_, sizeof(float) * m_.D * m_.D);
    }

    // Keys (in the tape) and queries of a tile to the rows it reads at.
    void read_through_projection(const float* matrix) {
        projection_.keys(tile_.tape.k);
        projection_.project(matrix, q_, tile_.x);
        if (c_.normalize) projection_.normalise(tile_.x);
    }

    void coefficients_of(const Span& span, bool anchored) {
        for (int t = 0; t < span.n; t++) {
            const int64_t i = (start_ + span.first + t) * c_.H + head_;
            gates_.lr[t] = c_.lr[i];
            gates_.momentum[t] = c_.momentum ? c_.momentum[i] : 0.0f;
            gates_.keep[t] = c_.decay ? 1.0f - c_.decay[i] : 1.0f;
            if (c_.scale) gates_.scale[t] = c_.scale[span.place + t];
        }
        gates_.end_scale = c_.scale && ends_chunk(span) ? c_.scale[c_.chunk_size - 1] : 1.0f;
        coefficients<R>(gates_, rule_, span.n, anchored, coefficients_);
    }
    bool ends_chunk(const Span& span) const { return span.place + span.n == c_.chunk_size; }

    // The key sides of a group of chunks, with the states before them.
    void walk_again(int64_t group, float* trace) {
        const int64_t length = c_.interval * c_.chunk_size;
        const int64_t first = std::max<int64_t>(0, group * length - offset_);
        const int64_t stop = std::min(count_, (group + 1) * length - offset_);
        Arena arena(trace);
        steps_.clear();
        const Start start = start_of(group);
        const float *weights = start.weights, *anchor = start.anchor, *momentum = start.momentum;
        if (start.matrix) std::memcpy(matrix_, start.matrix, sizeof(float) * m_.D * m_.D);
        for (int64_t i = first; i < stop;) {
            const Span span = span_at(i, stop);
            const bool learns = learns_at(span), anchored = span.place > 0;
            if (!anchored) anchor = weights;
            if (!anchored && c_.rule == CHUNK) std::memset(matrix_, 0, sizeof(float) * m_.D * m_.D);
            Step step{span, weights, anchor, momentum, nullptr, KeyTape<R>(m_, arena)};
            tile_.tape = step.tape;
            if (learns || !c_.is_global) {
                load(c_.k, span, step.tape.k);
                load(c_.v, span, tile_.v);
                tile_.keys(anchor);
            }
            if (c_.rule) {
                float* matrix = arena.take(m_.D * m_.D);
                std::memcpy(matrix, matrix_, sizeof(float) * m_.D * m_.D);
                step.matrix = matrix;
                projection_.keys(step.tape.k);
                projection_.learn(matrix_);
            }
            if (learns && i + span.n < stop) {
                coefficients_of(span, anchored);
                // Inside a chunk nothing is read at a global memory's weights, nor do plain ones matter to the backward;
                // but the first ones are the caller's.
                const bool is_gated = rule_.momentum || rule_.decay;
                const bool stays = !anchored || !c_.is_global || is_gated || weights == start.weights;
                float* to = stays ? arena.take(m_.size) : const_cast<float*>(weights);
                float* momentum_to = rule_.momentum ? arena.take(m_.size) : nullptr;
                tile_.learn(weights, to, rule_.momentum ? momentum : anchor, momentum_to, coefficients_);
                weights = to, momentum = momentum_to;
            }
            steps_.push_back(step);
            i += span.n;
        }
    }

    void step_backward(const Step& step) {
        const Span& span = step.span;
        const bool learns = learns_at(span), anchored = span.place > 0;
        tile_.tape = step.tape;
        load(c_.q, span, q_);
        load(c_.grad_o, span, tile_.grad_o);
        if (c_.rule)
            read_through_projection(step.matrix);
        else
            std::memcpy(tile_.x, q_, sizeof(float) * m_.D * R);
        coefficients_of(span, anchored);
        float* grad_anchor = anchored ? grad_anchor_ : grad_weights_;
        const float* second = rule_.momentum ? step.momentum : step.anchor;
        float* grad_second = rule_.momentum ? grad_momentum_ : grad_anchor_;
        if (learns || !c_.is_global) tile_.again();
        const auto step_back = c_.is_global ? &Tile<R>::template backward<false> : &Tile<R>::template backward<true>;
        (tile_.*step_back)(
            step.weights, step.anchor, second, grad_weights_, grad_anchor, grad_second, coefficients_, gradients_, learns);
        gates_backward(span, anchored);
        float* grad_q = tile_.grad_x;
        if (c_.rule) {
            if (c_.normalize) projection_.normalise_backward(tile_.x, tile_.grad_x);
            projection_.project(step.matrix, tile_.grad_x, tile_.o);
            projection_.keys_backward(q_, tile_.grad_x, grad_matrix_, tile_.grad_k);
            grad_q = tile_.o;
            if (!anchored && c_.rule == CHUNK) std::memset(grad_matrix_, 0, sizeof(float) * m_.D * m_.D);
        }
        store(grad_q, span, c_.grad_q);
        store(tile_.grad_k, span, c_.grad_k);
        store(tile_.grad_v, span, c_.grad_v);
        if (!anchored) absorb_anchor();
    }

    // A chunk starts with its weights as its anchor.
    void absorb_anchor() {
        for (ptrdiff_t i = 0; i < m_.size; i++) grad_weights_[i] += grad_anchor_[i], grad_anchor_[i] = 0;
    }

    void gates_backward(const Span& span, bool anchored) {
        coefficients_backward<R>(gates_, rule_, span.n, anchored, coefficients_, gradients_, grad_gates_);
        for (int t = 0; t < span.n; t++) {
            const int64_t i = (start_ + span.first + t) * c_.H + head_;
            c_.grad_lr[i] = grad_gates_.lr[t];
            if (c_.grad_momentum) c_.grad_momentum[i] = grad_gates_.momentum[t];
            if (c_.grad_decay) c_.grad_decay[i] = -grad_gates_.keep[t];
        }
        if (!c_.scale) return;
        float* grad_scale = c_.grad_scale + item() * c_.chunk_size;
        for (int t = 0; t < span.n; t++) grad_scale[span.place + t] += grad_gates_.scale[t];
        if (ends_chunk(span)) grad_scale[c_.chunk_size - 1] += grad_gates_.end_scale;
    }

    // Tokens of this head as lanes, zeros behind the last one.
    void load(const void* tokens, const Span& span, float* lanes) {
        const int D = m_.D;
        const int64_t first = ((start_ + span.first) * c_.H + head_) * D, stride = c_.H * D;
        if (span.n == R && !c_.is_bfloat16)
            return transpose<R>(static_cast<const float*>(tokens) + first, stride, R, D, lanes, R);
        for (int t = 0; t < span.n; t++)
            read_numbers(tokens, c_.is_bfloat16, first + t * stride, D, rows_ + t * D);
        std::memset(rows_ + span.n * D, 0, sizeof(float) * (R - span.n) * D);
        transpose<R>(rows_, R, D, lanes);
    }
    void store(const float* lanes, const Span& span, void* tokens) {
        const int D = m_.D;
        const int64_t first = ((start_ + span.first) * c_.H + head_) * D, stride = c_.H * D;
        if (span.n == R && !c_.is_bfloat16)
            return transpose<R>(lanes, R, D, R, static_cast<float*>(tokens) + first, stride);
        transpose<R>(lanes, D, R, rows_);
        for (int t = 0; t < span.n; t++)
            write_numbers(rows_ + t * D, c_.is_bfloat16, first + t * stride, D, tokens);
    }

    const Call& c_;
    const Memory& m_;
    Arena arena_;
    Tile<R> tile_;
    Projection<R> projection_;
    KeyTape<R> tape_;  // of the forward
    Rule rule_;
    Gates<R> gates_, grad_gates_;
    Coefficients<R> coefficients_;
    CoefficientGradients<R> gradients_;
    std::vector<Step> steps_;
    float *weights_, *anchor_, *momentum_, *matrix_, *q_, *rows_;
    float *grad_weights_, *grad_anchor_, *grad_momentum_, *grad_matrix_;
    int64_t segment_, head_, start_, count_, offset_, source_, end_;
};

static Memory memory_of(const Call& c) {
    Memory m{};
    m.D = int(c.D), m.M = int(c.M), m.maps = int(c.maps), m.has_norm = c.gain != nullptr;
    for (int l = 0; l < m.maps; l++) {
        Map& map = m.map[l];
        map.in = l == 0 ? m.D : m.M;
        map.out = l + 1 == m.maps ? m.D : m.M;
        map.weight = m.size;
        m.size += map.in * map.out;
        map.bias = c.biases >> l & 1 ? m.size : -1;
        if (map.bias >= 0) m.size += map.out;
    }
    return m;
}

template <int R, bool BACKWARD> void run(const Call& c) {
    const Memory m = memory_of(c);
    const size_t own = Walk<R>::floats(m), trace = BACKWARD ? Walk<R>::trace_floats(c, m) : 0;
#pragma omp parallel num_threads(int(std::min(c.threads, c.S* c.H)))
    {
        float* room = workspace(own + trace + 64);
        Walk<R> walk(c, m, room);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < c.S * c.H; i++) {
            if (BACKWARD)
                walk.backward(i / c.H, i % c.H, room + own);
            else
                walk.forward(i / c.H, i % c.H);
        }
    }
}

}  // namespace tnt

#define TNT_EXPORT extern "C" __attribute__((visibility("default")))

TNT_EXPORT void tnt_memory_forward(const tnt::Call* call) {
    call->rows == 8 ? tnt::run<8, false>(*call) : tnt::run<16, false>(*call);
}
TNT_EXPORT void tnt_memory_backward(const tnt::Call* call) {
    call->rows == 8 ? tnt::run<8, true>(*call) : tnt::run<16, true>(*call);
}
