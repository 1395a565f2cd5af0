// Small products with weights as they lie in memory: fp32, bf16, or int8 in groups with a scale each. Every weight is
// read once for all rows of the batch; sums are kept in float.
#pragma once
#include "vectors.h"

static const int GROUP = 32;  // int8 weights of one output that share a scale

// A weight [outputs, inputs] of one of three kinds; `scale` [outputs, inputs / GROUP] is there for int8 only.
struct Matrix { const void* data; const float* scale; const float* bias; int64_t kind, outputs, inputs; };

// Sums of R outputs for B rows, a vector each, still to be added up across its lanes.
template <int R, int B, class W> static inline void tile(const W* w, const float*, const float* x, int n, Floats (&acc)[R][B]) {
    for (int i = 0; i < n; i += LANES) {
        Floats xs[B];
        for (int b = 0; b < B; b++) xs[b] = load(x + (int64_t)b * n + i);
        for (int r = 0; r < R; r++) { Floats v = load(w + (int64_t)r * n + i); for (int b = 0; b < B; b++) acc[r][b] += v * xs[b]; }
    }
}
template <int R, int B> static inline void tile(const int8_t* w, const float* scale, const float* x, int n, Floats (&acc)[R][B]) {
    int groups = n / GROUP;
    for (int g = 0; g < groups; g++) {
        Floats xs[B][2];
        for (int b = 0; b < B; b++) for (int j = 0; j < 2; j++) xs[b][j] = load(x + (int64_t)b * n + g * GROUP + j * LANES);
        for (int r = 0; r < R; r++) {
            const int8_t* p = w + (int64_t)r * n + g * GROUP;
            float s = scale[(int64_t)r * groups + g];
            Floats low = load(p) * s, high = load(p + LANES) * s;
            for (int b = 0; b < B; b++) acc[r][b] += low * xs[b][0] + high * xs[b][1];
        }
    }
}
template <int R, int B, class W> static inline void block(const W* w, const float* scale, const float* bias, const float* x, float* y, int n, int64_t stride) {
    Floats acc[R][B] = {};
    tile<R, B>(w, scale, x, n, acc);
    for (int r = 0; r < R; r++) for (int b = 0; b < B; b++) y[b * stride + r] = sum(acc[r][b]) + (bias ? bias[r] : 0.0f);
}
template <int R, class W> static void rows_of(const Matrix& m, int64_t first, const float* x, float* y, int64_t stride, int batch) {
    int n = (int)m.inputs;
    const W* w = (const W*)m.data + first * n;
    const float* scale = m.scale ? m.scale + first * (n / GROUP) : nullptr;
    const float* bias = m.bias ? m.bias + first : nullptr;
    y += first;
    int b = 0;
    const int H = R > 1 ? 2 : 1;  // two outputs for eight rows fill the registers as four for four do, and widen a weight once
    for (; sizeof(W) < 4 && b + 8 <= batch; b += 8)
        for (int r = 0; r < R; r += H)
            block<H, 8>(w + (int64_t)r * n, scale ? scale + r * (n / GROUP) : nullptr, bias ? bias + r : nullptr, x + (int64_t)b * n, y + r + b * stride, n, stride);
    for (; b + 4 <= batch; b += 4) block<R, 4>(w, scale, bias, x + (int64_t)b * n, y + b * stride, n, stride);
    for (; b < batch; b++) block<R, 1>(w, scale, bias, x + (int64_t)b * n, y + b * stride, n, stride);
}
template <class W> static void share(const Matrix& m, const float* x, float* y, int64_t stride, int batch, int me, int all) {
    const int R = 4;
    int64_t tiles = (m.outputs + R - 1) / R, from = tiles * me / all * R, to = tiles * (me + 1) / all * R;
    if (to > m.outputs) to = m.outputs;
    int64_t r = from;
    for (; r + R <= to; r += R) rows_of<R, W>(m, r, x, y, stride, batch);
    for (; r < to; r++) rows_of<1, W>(m, r, x, y, stride, batch);
}
// This thread's share of y [batch, stride] = x [batch, inputs] times the weight, its bias added.
static void product(const Matrix& m, const float* x, float* y, int64_t stride, int batch, int me, int all) {
    if (m.kind == 0) share<float>(m, x, y, stride, batch, me, all);
    else if (m.kind == 1) share<uint16_t>(m, x, y, stride, batch, me, all);
    else share<int8_t>(m, x, y, stride, batch, me, all);
}
