// The decode step: one new token of every row through all memories of a layer, state written in place.
//
// A task is one head of one row of one memory. With the equations of kernels/api.py and README.md, T = 1:
//
//     before a shard: W := W_init, S := 0, M := 0      before a chunk: W_anchor := W
//     S := m S − lr G(W_anchor)      W := (1 − decay) W + S      M := M + k kᵀ/‖k‖²
//     local: f(W, M q)      global: f(W_anchor, q)      o = their sum, in the order of the memories
//
// What a step costs is the state's way through the cores: the anchor is read once forward and once back (but for the
// first map), then weights and momentum are read, written and read at in one pass. A map's bias lies behind its weights
// in the packed state, so it is one more row of the matrix, met by an input of 1.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "row.h"

namespace tnt::decode {

constexpr float SMALLEST_LENGTH = 1e-6f;  // of q and k before they get length 1: what is shorter stays below it

// A memory's tensors, by place: [chunk_size], the gates [rows, H], and behind them the fields of MemoryParams:
// w1, b1, w2, b2, norm_weight, norm_bias, w3, b3, … [H, inputs, outputs], [H, outputs], [H, D].
enum Place : int64_t { TOKEN_SCALE = 0, LR = 1, MOMENTUM = 2, DECAY = 3, PARAMS = 4, PLACES = PARAMS + 18 };
constexpr int64_t NORM_WEIGHT = PARAMS + 4, NORM_BIAS = PARAMS + 5;
constexpr int64_t weight_place(int64_t map) { return PARAMS + (map < 2 ? 2 * map : 2 * map + 2); }
constexpr int64_t bias_place(int64_t map) { return weight_place(map) + 1; }

struct Memory {  // one memory's options and tensors
    int64_t chunk_size;
    int64_t shard_length;  // 0: never reset
    int64_t is_global;
    int64_t slot;  // of its projection; −1: none
    int64_t projects_by_chunk;
    int64_t normalizes;
    const void* tensors[PLACES];  // null where there is none
    int64_t types[PLACES];
    double base_lr;  // by which lr is multiplied if it is a logit
};

struct Line {  // q, k or v [rows, H, D], features contiguous
    const void* data;
    int64_t type, row, head;  // strides
};

// Of a layer's step: q, k, v and gates are given as they are before their activations, see `prepare` and `gate`.
struct Layer {
    int64_t is_given;
    const void* taps;  // of the convolution [3 H D, tap_count]; null: there is none
    int64_t taps_type, tap_count;
    void* tail;  // its last inputs [rows, tap_count − 1, 3 H D], of the type of q, k, v; advanced by the token
    const void* norm;  // of every head's output, RMSNorm's weight [D]; null: there is none, nor a gate
    int64_t norm_type;
    double norm_eps;
    const void* gate;  // [rows, H D]: the normed output is multiplied by silu of it; null: there is none
    int64_t gate_type;
};

struct Step {  // a step's arguments; the same fields stand in step.py
    int64_t memories, rows, heads, dim, hidden, maps, has_bias, packed;
    const Memory* memory;  // [memories]
    float* weights;  // [memories, rows, H, packed], as the next two; momentum may be null
    float* anchor;
    float* momentum;
    float* projection;  // [slots, rows, H, D, D]
    int64_t* position;  // [memories, rows, H]
    Line q, k, v;
    Layer layer;
    const uint8_t* active;  // [rows] or null: all
    float* o;  // [rows, H, D]
    int64_t threads;
};

// Of one token: how the state of one head advances.
struct Advance {
    float momentum, keep, scale;
    bool at_start, at_end;
};

// S := m S − aᵀ δ, W := keep W + S, and if READ y := x W, in one pass over a map's matrices [inputs, outputs].
// The anchor becomes the weights before the token where a chunk starts, and those behind it where one ends. With a
// token scale what is read, and what a chunk leaves behind, is W_anchor + r (W − W_anchor).
template <bool MOMENTUM, bool SCALED, bool READ>
void advance_map(
    float* weights, float* anchor, float* momentum, const float* __restrict a, const float* __restrict delta,
    const float* __restrict x, float* __restrict y, int64_t inputs, int64_t outputs, const Advance& by) {
    const size_t bytes = size_t(outputs) * sizeof(float);
    const float m = by.momentum, keep = by.keep, r = by.scale;
    if (READ) std::memset(y, 0, bytes);
    for (int64_t i = 0; i < inputs; ++i) {
        float* __restrict w = weights + i * outputs;
        float* __restrict before = anchor + i * outputs;
        float* __restrict s = MOMENTUM ? momentum + i * outputs : nullptr;
        const float input = a[i], at = READ ? x[i] : 0.0f;
        if (by.at_start && (SCALED || !by.at_end)) std::memcpy(before, w, bytes);
#pragma omp simd
        for (int64_t o = 0; o < outputs; ++o) {
            float step = -input * delta[o];
            if (MOMENTUM) {
                step += m * s[o];
                s[o] = step;
            }
            const float now = keep * w[o] + step;
            w[o] = now;
            if (READ) y[o] += at * (SCALED ? before[o] + r * (now - before[o]) : now);
        }
        if (SCALED && by.at_end) {
#pragma omp simd
            for (int64_t o = 0; o < outputs; ++o) w[o] = before[o] + r * (w[o] - before[o]);
        }
        if (by.at_end) std::memcpy(before, w, bytes);
    }
}

// x := q M behind M += k kᵀ/‖k‖²; a chunk's sum begins at zero and is left at zero.
void project(
    float* projection, const float* __restrict unit_k, const float* __restrict q, float* __restrict x, int64_t dim,
    bool from_zero, bool to_zero) {
    std::memset(x, 0, size_t(dim) * sizeof(float));
    if (from_zero) std::memset(projection, 0, size_t(dim * dim) * sizeof(float));
    for (int64_t i = 0; i < dim; ++i) {
        float* __restrict row = projection + i * dim;
#pragma omp simd
        for (int64_t o = 0; o < dim; ++o) {
            row[o] += unit_k[i] * unit_k[o];
            x[o] += q[i] * row[o];
        }
    }
    if (to_zero) std::memset(projection, 0, size_t(dim * dim) * sizeof(float));
}

// q, k and v of every row and head, as the memories see them.
struct Tokens {
    const Step& s;
    int64_t width;
    std::vector<float> numbers;
    std::vector<float> taps, before;  // what `convolve` works in

    explicit Tokens(const Step& step)
        : s(step), width(row_width(s.dim)), numbers(size_t(3 * s.rows * s.heads * width)),
          taps(size_t(s.layer.is_given && s.layer.taps ? s.dim * s.layer.tap_count : 0)), before(size_t(s.dim)) {}
    float* at(int64_t part, int64_t row, int64_t head) {
        return numbers.data() + ((part * s.rows + row) * s.heads + head) * width;
    }
};

// What the convolution makes of the newest input x of one head's q, k or v, which is channels from the `first` on.
void convolve(const Step& s, Tokens& tokens, float* __restrict x, int64_t row, int64_t first) {
    const Layer& layer = s.layer;
    const int64_t count = layer.tap_count, channels = 3 * s.heads * s.dim;
    float* __restrict taps = tokens.taps.data();
    float* __restrict before = tokens.before.data();
    widen(taps, layer.taps, layer.taps_type, first * count, s.dim * count);
    for (int64_t i = 0; i < s.dim; ++i) x[i] *= taps[i * count + count - 1];
    for (int64_t j = 0; j + 1 < count; ++j) {
        widen(before, layer.tail, s.q.type, (row * (count - 1) + j) * channels + first, s.dim);
        for (int64_t i = 0; i < s.dim; ++i) x[i] += taps[i * count + j] * before[i];
    }
}

// The newest inputs of a row come to the end of its tail, and the oldest are forgotten.
void advance_tail(const Step& s, int64_t row) {
    if (s.layer.tap_count < 2) return;
    const int64_t number = s.q.type == FLOAT32 ? 4 : 2, part = s.heads * s.dim * number;  // bytes
    const int64_t kept = (s.layer.tap_count - 2) * 3 * part;
    char* tail = static_cast<char*>(s.layer.tail) + row * (kept + 3 * part);
    std::memmove(tail, tail + 3 * part, size_t(kept));
    tail += kept;
    for (const Line* line : {&s.q, &s.k, &s.v}) {
        std::memcpy(tail, static_cast<const char*>(line->data) + row * line->row * number, size_t(part));
        tail += part;
    }
}

// Of a layer's step q, k and v are silu of the convolution of what is projected, and heads of q and k get length 1.
void prepare(const Step& s, Tokens& tokens) {
    const Line lines[] = {s.q, s.k, s.v};
    for (int64_t row = 0; row < s.rows; ++row) {
        if (s.active && !s.active[row]) continue;
        for (int64_t part = 0; part < 3; ++part) {
            const Line& line = lines[part];
            for (int64_t head = 0; head < s.heads; ++head) {
                float* x = tokens.at(part, row, head);
                widen(x, line.data, line.type, row * line.row + head * line.head, s.dim);
                if (!s.layer.is_given) continue;
                if (s.layer.taps) convolve(s, tokens, x, row, (part * s.heads + head) * s.dim);
                silu(x, s.dim);
                if (part < 2) make_unit(x, s.dim, SMALLEST_LENGTH);
            }
        }
        if (s.layer.is_given && s.layer.taps) advance_tail(s, row);
    }
}

// What a thread works in. Lines are as wide as the widest input of a map and its 1.
struct Workspace {
    int64_t width;
    std::vector<float> numbers;

    explicit Workspace(const Step& s)
        : width(row_width(std::max(s.dim, s.hidden) + 1)), numbers(size_t(width * (7 + 3 * s.maps))) {}
    float* line(int64_t i) { return numbers.data() + i * width; }
    float* value() { return line(0); }
    float* query() { return line(1); }
    float* spare() { return line(2); }
    float* norm_weight() { return line(3); }
    float* norm_bias() { return line(4); }
    float* read(int64_t parity) { return line(5 + parity); }  // a read's way through the maps
    float* key() { return input(0); }
    float* input(int64_t map) { return line(7 + 3 * map); }  // of a map, at the key
    float* slope(int64_t map) { return line(8 + 3 * map); }  // of the function in front of a map
    float* delta(int64_t map) { return line(9 + 3 * map); }  // the gradient at a map's output, times lr
};

struct Head {  // one head's task
    const Step& s;
    const Memory& memory;
    int64_t row, head, at;  // `at` counts heads of all memories and rows
    Tokens& tokens;
    Workspace& work;

    int64_t inputs(int64_t map) const { return map == 0 ? s.dim : s.hidden; }
    int64_t outputs(int64_t map) const { return map == s.maps - 1 ? s.dim : s.hidden; }
    int64_t lines(int64_t map) const { return inputs(map) + s.has_bias; }
    int64_t offset(int64_t map) const {
        int64_t sum = 0;
        for (int64_t i = 0; i < map; ++i) sum += lines(i) * outputs(i);
        return sum;
    }

    float* weights() const { return s.weights + at * s.packed; }
    float* anchor() const { return s.anchor + at * s.packed; }
    float* momentum() const { return s.momentum ? s.momentum + at * s.packed : nullptr; }
    float* projection() const {
        return s.projection + ((memory.slot * s.rows + row) * s.heads + head) * s.dim * s.dim;
    }

    bool has(int64_t place) const { return memory.tensors[place]; }
    void load_tensor(float* target, int64_t place, int64_t first, int64_t count) const {
        widen(target, memory.tensors[place], memory.types[place], first, count);
    }
    // `count` numbers of this head.
    void load_param(float* target, int64_t place, int64_t count) const {
        load_tensor(target, place, head * count, count);
    }

    void reset() const {
        for (int64_t map = 0; map < s.maps; ++map) {
            float* target = weights() + offset(map);
            const int64_t size = inputs(map) * outputs(map);
            load_param(target, weight_place(map), size);
            if (s.has_bias) load_param(target + size, bias_place(map), outputs(map));
        }
        if (s.momentum) std::memset(momentum(), 0, size_t(s.packed) * sizeof(float));
        if (memory.slot >= 0) std::memset(projection(), 0, size_t(s.dim * s.dim) * sizeof(float));
    }

    // The last map's output at x becomes f(x).
    void finish(float* __restrict y, const float* __restrict x) const {
        if (!has(NORM_WEIGHT)) return;
        standardise(y, s.dim);
        const float* __restrict weight = work.norm_weight();
        const float* __restrict bias = work.norm_bias();
#pragma omp simd
        for (int64_t i = 0; i < s.dim; ++i) y[i] = x[i] + bias[i] + y[i] * weight[i];
    }

    // f(W, x) at weights that stay; x has room for a 1 behind it.
    float* read_at(const float* w, float* x) const {
        float* line = x;
        for (int64_t map = 0; map < s.maps; ++map) {
            float* y = work.read(map % 2);
            line[inputs(map)] = 1.0f;
            times(line, w + offset(map), y, lines(map), outputs(map));
            if (map + 1 < s.maps) gelu(y, nullptr, outputs(map));
            line = y;
        }
        finish(line, x);
        return line;
    }

    // The gradient of ½‖f(W, k) − v‖² at every map's output, times lr, into `delta`; each map's input into `input`.
    void gradient(const float* w, float lr) const {
        const int64_t last = s.maps - 1;
        for (int64_t map = 0; map < s.maps; ++map) {
            float* y = map == last ? work.delta(last) : work.input(map + 1);
            work.input(map)[inputs(map)] = 1.0f;
            times(work.input(map), w + offset(map), y, lines(map), outputs(map));
            if (map < last) gelu(y, work.slope(map + 1), outputs(map));
        }
        output_gradient(work.delta(last), lr);
        for (int64_t map = last; map > 0; --map) {
            const float *matrix = w + offset(map), *delta = work.delta(map), *slope = work.slope(map);
            float* u = work.delta(map - 1);
            for (int64_t i = 0; i < inputs(map); ++i) {
                u[i] = slope[i] * dot(matrix + i * outputs(map), delta, outputs(map));
            }
        }
    }

    // With the norm f = k + γ n + β, n = LN(y): δ = r (g − mean g − n mean(g n)) with g = lr γ (f − v). In place of y.
    void output_gradient(float* __restrict y, float lr) const {
        const float* __restrict k = work.key();
        const float* __restrict v = work.value();
        if (!has(NORM_WEIGHT)) {
#pragma omp simd
            for (int64_t i = 0; i < s.dim; ++i) y[i] = lr * (y[i] - v[i]);
            return;
        }
        const float rstd = standardise(y, s.dim);
        const float* __restrict weight = work.norm_weight();
        const float* __restrict bias = work.norm_bias();
        float* __restrict g = work.spare();
        float mean = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : mean, product)
        for (int64_t i = 0; i < s.dim; ++i) {
            g[i] = lr * weight[i] * (k[i] + bias[i] + y[i] * weight[i] - v[i]);
            mean += g[i];
            product += g[i] * y[i];
        }
        mean /= float(s.dim);
        product /= float(s.dim);
#pragma omp simd
        for (int64_t i = 0; i < s.dim; ++i) y[i] = rstd * (g[i] - mean - y[i] * product);
    }

    // The state advances, and if READ it is read at x on the way; returns f(W, x).
    template <bool READ> float* advance(float* x, const Advance& by) const {
        auto* with = s.momentum ? advance_map<true, false, READ> : advance_map<false, false, READ>;
        if (has(TOKEN_SCALE)) with = advance_map<false, true, READ>;
        float* line = x;
        for (int64_t map = 0; map < s.maps; ++map) {
            const int64_t from = offset(map);
            float* surprise = s.momentum ? momentum() + from : nullptr;
            float* y = READ ? work.read(map % 2) : nullptr;
            if (READ) line[inputs(map)] = 1.0f;
            with(
                weights() + from, anchor() + from, surprise, work.input(map), work.delta(map), line, y, lines(map),
                outputs(map), by);
            if (READ && map + 1 < s.maps) gelu(y, nullptr, outputs(map));
            line = y;
        }
        if (READ) finish(line, x);
        return line;
    }

    // A layer's gates are logits; that of lr is of a share of the base.
    float gate(int64_t place) const {
        float value;
        load_tensor(&value, place, row * s.heads + head, 1);
        if (s.layer.is_given) value = 1.0f / (1.0f + std::exp(-value));
        return s.layer.is_given && place == LR ? float(memory.base_lr) * value : value;
    }

    float token_scale(int64_t in_chunk) const {
        float value = 1.0f;
        if (has(TOKEN_SCALE)) load_tensor(&value, TOKEN_SCALE, in_chunk, 1);
        return value;
    }

    // The token; returns the memory's output [D].
    const float* run() const {
        int64_t& position = s.position[at];
        if (memory.shard_length > 0 && position % memory.shard_length == 0) reset();
        const int64_t in_chunk = position % memory.chunk_size;
        const bool at_start = in_chunk == 0, at_end = in_chunk + 1 == memory.chunk_size;
        ++position;

        float* const lines[] = {work.query(), work.key(), work.value()};
        for (int64_t part = 0; part < 3; ++part) {
            std::memcpy(lines[part], tokens.at(part, row, head), size_t(s.dim) * sizeof(float));
        }
        if (has(NORM_WEIGHT)) {
            load_param(work.norm_weight(), NORM_WEIGHT, s.dim);
            load_param(work.norm_bias(), NORM_BIAS, s.dim);
        }
        float* x = work.query();
        if (memory.slot >= 0) x = projected(at_start, at_end);
        const float* start = at_start ? weights() : anchor();
        gradient(start, gate(LR));
        const Advance by{
            s.momentum ? gate(MOMENTUM) : 0.0f,
            has(DECAY) ? 1.0f - gate(DECAY) : 1.0f,
            token_scale(in_chunk),
            at_start,
            at_end,
        };
        if (!memory.is_global) return advance<true>(x, by);
        const float* o = read_at(start, x);
        advance<false>(x, by);
        return o;
    }

    // M q, in place of q.
    float* projected(bool at_start, bool at_end) const {
        std::memcpy(work.spare(), work.key(), size_t(s.dim) * sizeof(float));
        make_unit(work.spare(), s.dim);
        const bool by_chunk = memory.projects_by_chunk;
        float* x = work.read(0);
        project(projection(), work.spare(), work.query(), x, s.dim, by_chunk && at_start, by_chunk && at_end);
        if (memory.normalizes) make_unit(x, s.dim);
        std::memcpy(work.query(), x, size_t(s.dim) * sizeof(float));
        return work.query();
    }
};

// o = RMSNorm(o) of each head, times silu(gate).
static void finish(const Step& s) {
    const Layer& layer = s.layer;
    const int64_t width = s.heads * s.dim, room = row_width(s.dim);
    std::vector<float> weight(size_t(room), 0.0f), gate(static_cast<size_t>(room), 0.0f);
    widen(weight.data(), layer.norm, layer.norm_type, 0, s.dim);
    for (int64_t at = 0; at < s.rows * width; at += s.dim) {
        float* o = s.o + at;
        const float scale = 1.0f / std::sqrt(dot(o, o, s.dim) / float(s.dim) + float(layer.norm_eps));
        for (int64_t d = 0; d < s.dim; ++d) o[d] *= scale * weight[size_t(d)];
        if (!layer.gate) continue;
        widen(gate.data(), layer.gate, layer.gate_type, at, s.dim);
        silu(gate.data(), room);
        for (int64_t d = 0; d < s.dim; ++d) o[d] *= gate[size_t(d)];
    }
}

}  // namespace tnt::decode

extern "C" __attribute__((visibility("default"))) void tnt_step(const tnt::decode::Step* step) {
    using namespace tnt::decode;
    const Step& s = *step;
    const int64_t heads = s.rows * s.heads, tasks = s.memories * heads, width = heads * s.dim;
    std::vector<float> outputs(size_t(s.memories * width));
    Tokens tokens(s);
    prepare(s, tokens);
#pragma omp parallel num_threads(int(s.threads)) if (s.threads > 1)
    {
        Workspace work(s);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < tasks; ++at) {
            const int64_t i = at / heads, row = at % heads / s.heads, head = at % s.heads;
            if (s.active && !s.active[row]) continue;  // `outputs` are zeros
            const float* o = Head{s, s.memory[i], row, head, at, tokens, work}.run();
            std::memcpy(outputs.data() + at * s.dim, o, size_t(s.dim) * sizeof(float));
        }
    }
    for (int64_t j = 0; j < width; ++j) {
        float sum = outputs[size_t(j)];
        for (int64_t i = 1; i < s.memories; ++i) sum += outputs[size_t(i * width + j)];
        s.o[j] = sum;
    }
    if (s.layer.is_given && s.layer.norm) finish(s);
}
