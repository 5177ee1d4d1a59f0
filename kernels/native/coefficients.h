// Coefficients of a tile from its gates, and back: two scalar recurrences, s ← momentum s + [new], w ← (1 − decay) w + s.
#pragma once

#include "tile.h"

namespace tnt {

// The numbers of n tokens of one head.
template <int R> struct Gates {
    alignas(64) float lr[R], momentum[R], keep[R], scale[R];
    float end_scale;  // with a token scale: of the last token, if the chunk ends with it, or 1
};

struct Rule {
    bool momentum, decay, scale;
};

// `anchored`: the tile's W is not its anchor, so that a token scale needs both.
template <int R> void coefficients(const Gates<R>& g, Rule rule, int n, bool anchored, Coefficients<R>& c) {
    c.has_momentum = rule.momentum;
    c.has_decay = rule.decay || (rule.scale && anchored);
    c.has_second = rule.momentum || (rule.scale && anchored);
    c.is_plain = !c.has_decay && !c.has_second;
    c.end_decay = c.momentum_decay = 1;
    c.end_second = 0;
    for (int t = 0; t < R; t++) {
        c.lr[t] = t < n ? g.lr[t] : 0;
        c.decay[t] = 1, c.second[t] = 0, c.carried[t] = 0;
        c.end[t] = t < n ? (rule.scale ? g.end_scale : 1.0f) : 0;
    }
    if (!rule.momentum && !rule.decay) {
        for (int j = 0; j < R; j++)
            for (int t = 0; t < R; t++) c.theta[j * R + t] = j > t ? 0.0f : rule.scale && t < n ? g.scale[t] : 1.0f;
        if (!c.has_second) return;
        for (int t = 0; t < n; t++) c.decay[t] = g.scale[t], c.second[t] = 1 - g.scale[t];
        c.end_decay = g.end_scale, c.end_second = 1 - g.end_scale;
        return;
    }
    float w[R] = {}, s[R] = {}, kept = 1, second = 0, carried = 1;
    std::memset(c.theta, 0, sizeof c.theta);
    for (int t = 0; t < n; t++) {
        const float keep = g.keep[t], momentum = g.momentum[t];
        for (int j = 0; j < R; j++) {
            s[j] = momentum * s[j] + (j == t ? 1.0f : 0.0f);
            w[j] = keep * w[j] + s[j];
        }
        for (int j = 0; j < R; j++) c.theta[j * R + t] = w[j];
        kept *= keep;
        carried *= momentum;
        second = keep * second + carried;
        c.decay[t] = kept;
        c.second[t] = rule.momentum ? second : 0;
    }
    std::memcpy(c.end, w, sizeof w);
    c.end_decay = kept;
    if (!rule.momentum) return;
    std::memcpy(c.carried, s, sizeof s);
    c.end_second = second;
    c.momentum_decay = carried;
}

// Step 8: the gradients of the gates.
template <int R>
void coefficients_backward(
    const Gates<R>& g, Rule rule, int n, bool anchored, const Coefficients<R>& c, CoefficientGradients<R>& grad,
    Gates<R>& out) {
    for (int j = 0; j < R; j++) {
        float sum = grad.end_gain[j] * c.end[j] + grad.momentum_gain[j] * c.carried[j];
        for (int t = 0; t < R; t++) sum += grad.gamma[j * R + t] * c.theta[j * R + t];
        out.lr[j] = sum;
    }
    if (rule.scale) {
        out.end_scale = 0;
        for (int j = 0; j < n; j++) out.end_scale += grad.end_gain[j] * c.lr[j];
        if (anchored) out.end_scale += grad.end_decay - grad.end_second;
        for (int t = 0; t < n; t++) {
            float sum = anchored ? grad.decay[t] - grad.second[t] : 0;
            for (int j = 0; j <= t; j++) sum += grad.gamma[j * R + t] * c.lr[j];
            out.scale[t] = sum;
        }
        return;
    }
    if (!rule.momentum && !rule.decay) return;
    // The columns of the recurrences: tokens, then W and S before the tile. w and s of column j after token t.
    constexpr int COLUMNS = R + 2;
    float w[R + 1][COLUMNS] = {}, s[R + 1][COLUMNS] = {};
    w[0][R] = s[0][R + 1] = 1;
    for (int t = 0; t < n; t++)
        for (int j = 0; j < COLUMNS; j++) {
            s[t + 1][j] = g.momentum[t] * s[t][j] + (j == t ? 1.0f : 0.0f);
            w[t + 1][j] = g.keep[t] * w[t][j] + s[t + 1][j];
        }
    float grad_w[COLUMNS], grad_s[COLUMNS];
    for (int j = 0; j < R; j++) {
        grad_w[j] = grad.end_gain[j] * c.lr[j];
        grad_s[j] = grad.momentum_gain[j] * c.lr[j];
    }
    grad_w[R] = grad.end_decay, grad_s[R] = 0;
    grad_w[R + 1] = grad.end_second, grad_s[R + 1] = grad.momentum_decay;
    for (int t = n - 1; t >= 0; t--) {
        for (int j = 0; j < R; j++) grad_w[j] += grad.gamma[j * R + t] * c.lr[j];
        grad_w[R] += grad.decay[t];
        grad_w[R + 1] += grad.second[t];
        float keep = 0, momentum = 0;
        for (int j = 0; j < COLUMNS; j++) {
            grad_s[j] += grad_w[j];
            keep += grad_w[j] * w[t][j];
            momentum += grad_s[j] * s[t][j];
            grad_w[j] *= g.keep[t];
            grad_s[j] *= g.momentum[t];
        }
        out.keep[t] = keep;
        out.momentum[t] = momentum;
    }
}

}  // namespace tnt
