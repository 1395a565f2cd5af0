// One token of every row through all blocks: one parallel region instead of a dozen calls per block.
#pragma once
#include <cmath>
#include <omp.h>
#include "products.h"

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *norm1, *norm2;
    void *key, *value;  // [batch, kv_heads, capacity, dim], float or bf16 as the step says
};
struct Step {
    int64_t layers, batch, width, heads, kv_heads, dim, hidden, activation, length, capacity, kept;  // kept: kind of keys and values
    double eps;
    const float *cos, *sin;     // [batch, dim]
    const uint8_t* mask;        // [batch, length + 1], or null where everything is seen
    const float* norm;
    float *x, *h, *a, *g, *u;   // [batch, width], widest input, heads * dim, hidden, hidden
    float* scores;              // [threads, length + 1]
};

static void normed(const Step& s, const float* x, const float* weight, float* out) {
    double total = 0;
    for (int64_t i = 0; i < s.width; i++) total += (double)x[i] * x[i];
    float scale = (float)(1.0 / std::sqrt(total / s.width + s.eps));
    for (int64_t i = 0; i < s.width; i++) out[i] = x[i] * scale * weight[i];
}
static void rotated(const Step& s, float* v, int64_t row) {
    const float *cos = s.cos + row * s.dim, *sin = s.sin + row * s.dim;
    int64_t half = s.dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = v[i], b = v[i + half];
        v[i] = a * cos[i] - b * sin[i];
        v[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}
// The activations of gates: silu, or gelu by its tanh, which is x times a sigmoid too.
static inline Floats activated(Floats g, int64_t kind) {
    const Floats inner = kind == 0 ? g : 1.5957691216057308f * (g + 0.044715f * g * g * g);
    const Floats e = exponential(inner > 0 ? -inner : inner);  // never of more than 0: no overflow
    return g * (inner > 0 ? 1.0f / (1.0f + e) : e / (1.0f + e));
}
static void gated(float* g, const float* u, int64_t count, int64_t kind) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) { Floats y = activated(load(g + i), kind) * load(u + i); std::memcpy(g + i, &y, sizeof y); }
    for (; i < count; i++) { Floats one = {g[i]}; g[i] = activated(one, kind)[0] * u[i]; }
}
// One row's query heads that share a head of keys; the new key and value are stored first.
template <class T> static void attended(const Step& s, const Layer& l, int64_t row, int64_t kv, const float* k, const float* v, float* scores) {
    const int64_t share = s.heads / s.kv_heads, keys = s.length + 1, dim = s.dim;
    T *key = (T*)l.key + (row * s.kv_heads + kv) * s.capacity * dim, *value = (T*)l.value + (row * s.kv_heads + kv) * s.capacity * dim;
    for (int64_t i = 0; i < dim; i++) { store(key + s.length * dim + i, k[i]); store(value + s.length * dim + i, v[i]); }
    const uint8_t* mask = s.mask ? s.mask + row * keys : nullptr;
    const float scale = 1.0f / std::sqrt((float)dim);
    for (int64_t j = 0; j < share; j++) {
        const int64_t head = kv * share + j;
        const float* q = s.a + (row * s.heads + head) * dim;
        float top = -1e30f;
        for (int64_t t = 0; t < keys; t += 4) {  // four sums at once hide each other's wait
            const int64_t some = keys - t < 4 ? keys - t : 4;
            Floats acc[4] = {};
            for (int64_t i = 0; i < dim; i += LANES) {
                Floats part = load(q + i);
                for (int64_t u = 0; u < 4; u++) acc[u] += part * load(key + (t + (u < some ? u : 0)) * dim + i);
            }
            for (int64_t u = 0; u < some; u++) {
                float score = (mask && !mask[t + u]) ? -1e30f : sum(acc[u]) * scale;
                scores[t + u] = score;
                if (score > top) top = score;
            }
        }
        float total = 0;
        int64_t t = 0;
        for (; t + LANES <= keys; t += LANES) { Floats e = exponential(load(scores + t) - top); std::memcpy(scores + t, &e, sizeof e); total += sum(e); }
        for (; t < keys; t++) { Floats one = {scores[t] - top}; scores[t] = exponential(one)[0]; total += scores[t]; }
        const float over = total > 0 ? 1.0f / total : 0.0f;
        float* out = s.h + (row * s.heads + head) * dim;
        int64_t i = 0;
        for (; i + 4 * LANES <= dim; i += 4 * LANES) {
            Floats acc[4] = {};
            for (int64_t t = 0; t < keys; t++)
                for (int u = 0; u < 4; u++) acc[u] += load(value + t * dim + i + u * LANES) * scores[t];
            for (int u = 0; u < 4; u++) { acc[u] *= over; std::memcpy(out + i + u * LANES, &acc[u], sizeof acc[u]); }
        }
        for (; i < dim; i += LANES) {
            Floats acc = {};
            for (int64_t t = 0; t < keys; t++) acc += load(value + t * dim + i) * scores[t];
            acc *= over;
            std::memcpy(out + i, &acc, sizeof acc);
        }
    }
}

// One token of every row through all blocks; x is overwritten by the normed hidden state.
extern "C" void step(const Step* given, const Layer* layers) {
    const Step s = *given;
    const int batch = (int)s.batch;
    const int64_t inner = s.heads * s.dim, narrow = s.kv_heads * s.dim;
    #pragma omp parallel
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        float* scores = s.scores + me * (s.length + 1);
        for (int64_t n = 0; n < s.layers; n++) {
            const Layer& l = layers[n];
            for (int b = me; b < batch; b += all) normed(s, s.x + b * s.width, l.norm1, s.h + b * s.width);
            #pragma omp barrier
            // queries to a, keys and values to g and u until they are turned and stored
            product(l.q, s.h, s.a, inner, batch, me, all);
            product(l.k, s.h, s.g, narrow, batch, me, all);
            product(l.v, s.h, s.u, narrow, batch, me, all);
            #pragma omp barrier
            for (int64_t i = me; i < batch * s.kv_heads; i += all) {
                int64_t row = i / s.kv_heads, kv = i % s.kv_heads, share = s.heads / s.kv_heads;
                float *k = s.g + row * narrow + kv * s.dim, *v = s.u + row * narrow + kv * s.dim;
                rotated(s, k, row);
                for (int64_t j = 0; j < share; j++) rotated(s, s.a + (row * s.heads + kv * share + j) * s.dim, row);
                if (s.kept == 0) attended<float>(s, l, row, kv, k, v, scores);
                else attended<uint16_t>(s, l, row, kv, k, v, scores);
            }
            #pragma omp barrier
            product(l.o, s.h, s.g, s.width, batch, me, all);
            #pragma omp barrier
            for (int b = me; b < batch; b += all) {
                float* x = s.x + b * s.width;
                for (int64_t i = 0; i < s.width; i++) x[i] += s.g[b * s.width + i];
                normed(s, x, l.norm2, s.h + b * s.width);
            }
            #pragma omp barrier
            product(l.gate, s.h, s.g, s.hidden, batch, me, all);
            product(l.up, s.h, s.u, s.hidden, batch, me, all);
            #pragma omp barrier
            int64_t many = batch * s.hidden, from = many * me / all, to = many * (me + 1) / all;
            gated(s.g + from, s.u + from, to - from, s.activation);
            #pragma omp barrier
            product(l.down, s.g, s.h, s.width, batch, me, all);
            #pragma omp barrier
            for (int b = me; b < batch; b += all)
                for (int64_t i = 0; i < s.width; i++) s.x[b * s.width + i] += s.h[b * s.width + i];
        }
        for (int b = me; b < batch; b += all) {
            normed(s, s.x + b * s.width, s.norm, s.h + b * s.width);
            std::memcpy(s.x + b * s.width, s.h + b * s.width, s.width * sizeof(float));
        }
    }
}
