// What a decoder does on a CPU between oneDNN's large products: attention of a prompt to itself, small products and one
// decoding step over weights as they lie in memory (fp32, bf16, or int8 in groups with a scale each).
//
// Writing one token is a walk over all weights, so what counts is that they stream: every weight is read once for all
// rows of the batch, sums are kept in float, and a step is one parallel region instead of a dozen calls per block.
// Vectors are the compiler's own (16 floats), so the same source serves AVX-512, AVX2 and NEON.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

static const int LANES = 16, GROUP = 32;

static inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
static inline Floats load(const uint16_t* p) {
    Halves v; std::memcpy(&v, p, sizeof v);
    Words wide = __builtin_convertvector(v, Words) << 16;
    return (Floats)wide;
}
static inline Floats load(const int8_t* p) {
#ifdef __AVX512F__  // gcc converts bytes element by element unless it is told the instruction
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    Bytes v; std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
#endif
}
// e to the power of lanes that are at most 0, to a few millionths (Cephes' polynomial); below -87 it is zero.
static inline Floats exponential(Floats x) {
    const Floats low = x * 0 - 87.0f;
    const Floats given = x;
    x = x > low ? x : low;
    const Ints whole = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // towards zero, so to the nearest
    const Floats n = __builtin_convertvector(whole, Floats);
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = (((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
              + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r + r + 1.0f;
    return given > low ? y * (Floats)((whole + 127) << 23) : y * 0;
}
static inline void store(float* p, float v) { *p = v; }
static inline void store(uint16_t* p, float v) {  // to the nearest, ties to even
    uint32_t bits; std::memcpy(&bits, &v, sizeof bits);
    *p = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float plain(float v) { return v; }
static inline float plain(uint16_t v) { uint32_t bits = (uint32_t)v << 16; float f; std::memcpy(&f, &bits, sizeof f); return f; }
static inline float sum(Floats v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

// A weight [outputs, inputs] of one of three kinds; `scale` [outputs, inputs / GROUP] is there for int8 only.
struct Matrix { const void* data; const float* scale; const float* bias; int64_t kind, outputs, inputs; };

// Sums of R outputs for B rows, a vector each, still to be added up across its lanes.
template <int R, int B> static inline void tile(const float* w, const float*, const float* x, int n, Floats (&acc)[R][B]) {
    for (int i = 0; i < n; i += LANES) {
        Floats xs[B];
        for (int b = 0; b < B; b++) xs[b] = load(x + (int64_t)b * n + i);
        for (int r = 0; r < R; r++) { Floats v = load(w + (int64_t)r * n + i); for (int b = 0; b < B; b++) acc[r][b] += v * xs[b]; }
    }
}
template <int R, int B> static inline void tile(const uint16_t* w, const float*, const float* x, int n, Floats (&acc)[R][B]) {
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

extern "C" int threads() { return omp_get_max_threads(); }

// y [batch, outputs] = x [batch, inputs] times the weight.
extern "C" void multiply(const Matrix* m, const float* x, float* y, int64_t batch) {
    #pragma omp parallel
    product(*m, x, y, m->outputs, (int)batch, omp_get_thread_num(), omp_get_num_threads());
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

// Attention of tokens to themselves, each to all or, where causal, to those before it. joined [batch, length, (heads +
// 2 kv_heads) * dim] holds queries, keys and values; out [batch, length, heads * dim]; where there is a cache to fill, the
// turned keys and the values go to key and value [batch, kv_heads, length, dim]; cos and sin [batch, length, dim] or null.
struct Prompt {
    int64_t batch, length, heads, kv_heads, dim, causal;
    const void* joined;
    const float *cos, *sin;
    void *out, *key, *value;
    float* scratch;  // per batch and head of keys: keys transposed [dim, padded] and values [padded, dim]; then scores
};

template <class T> static void turned(const Prompt& p, const T* from, int64_t at, float* to) {
    if (!p.cos) { for (int64_t i = 0; i < p.dim; i++) to[i] = plain(from[i]); return; }
    const float *cos = p.cos + at * p.dim, *sin = p.sin + at * p.dim;
    const int64_t half = p.dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = plain(from[i]), b = plain(from[i + half]);
        to[i] = a * cos[i] - b * sin[i];
        to[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

template <class T> static void attend(const Prompt& p) {
    const int Q = 4;  // queries that are worked on together
    const int64_t L = p.length, D = p.dim, padded = (L + 31) / 32 * 32, each = (p.heads + 2 * p.kv_heads) * D;
    const int64_t panel = 2 * padded * D, share = p.heads / p.kv_heads, blocks = (L + Q - 1) / Q;
    const float scale = 1.0f / std::sqrt((float)D);
    #pragma omp parallel
    {
        #pragma omp for collapse(2)
        for (int64_t bk = 0; bk < p.batch * p.kv_heads; bk++) for (int64_t part = 0; part < (L + 31) / 32; part++) {
            const int64_t b = bk / p.kv_heads, kv = bk % p.kv_heads, stop = part * 32 + 32 < L ? part * 32 + 32 : L;
            float *keys = p.scratch + bk * panel, *values = keys + padded * D;
            float tile[32][256];
            for (int64_t t = part * 32; t < stop; t++) {
                const T* row = (const T*)p.joined + (b * L + t) * each + (p.heads + kv) * D;
                float* k = tile[t - part * 32];
                turned(p, row, b * L + t, k);
                const T* v = row + p.kv_heads * D;
                T *key = (T*)p.key + (bk * L + t) * D, *value = (T*)p.value + (bk * L + t) * D;
                for (int64_t i = 0; i < D; i++) values[t * D + i] = plain(v[i]);
                if (p.key) for (int64_t i = 0; i < D; i++) { store(key + i, k[i]); value[i] = v[i]; }
            }
            for (int64_t i = 0; i < D; i++)
                for (int64_t t = part * 32; t < part * 32 + 32; t++) keys[i * padded + t] = t < stop ? tile[t - part * 32][i] : 0.0f;
        }
        float* scores = p.scratch + p.batch * p.kv_heads * panel + omp_get_thread_num() * Q * padded;
        #pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t bh = 0; bh < p.batch * p.heads; bh++) for (int64_t n = 0; n < blocks; n++) {
            const int64_t b = bh / p.heads, h = bh % p.heads, first = (blocks - 1 - n) * Q;  // the longest first
            const int64_t some = L - first < Q ? L - first : Q, seen = p.causal ? first + some : L, wide = (seen + 31) / 32 * 32;
            const float *keys = p.scratch + (b * p.kv_heads + h / share) * panel, *values = keys + padded * D;
            float q[Q][256] = {}, over[Q];
            for (int64_t j = 0; j < some; j++) {
                turned(p, (const T*)p.joined + (b * L + first + j) * each + h * D, b * L + first + j, q[j]);
                for (int64_t i = 0; i < D; i++) q[j][i] *= scale;
            }
            for (int64_t t = 0; t < wide; t += 32) {
                Floats acc[Q][2] = {};
                for (int64_t i = 0; i < D; i++) {
                    Floats low = load(keys + i * padded + t), high = load(keys + i * padded + t + LANES);
                    for (int j = 0; j < Q; j++) { acc[j][0] += low * q[j][i]; acc[j][1] += high * q[j][i]; }
                }
                for (int j = 0; j < Q; j++) std::memcpy(scores + j * padded + t, acc[j], sizeof acc[j]);
            }
            for (int64_t j = 0; j < Q; j++) {
                float *row = scores + j * padded, top = -1e30f, total = 0;
                const int64_t sees = p.causal ? first + j + 1 : L;
                if (j >= some) { for (int64_t t = 0; t < wide; t++) row[t] = 0; over[j] = 0; continue; }
                for (int64_t t = sees; t < wide; t++) row[t] = -1e30f;
                for (int64_t t = 0; t < sees; t++) top = row[t] > top ? row[t] : top;
                Floats all = {};
                for (int64_t t = 0; t < wide; t += LANES) {
                    Floats e = exponential(load(row + t) - top);
                    std::memcpy(row + t, &e, sizeof e);
                    all += e;
                }
                total = sum(all);
                over[j] = 1.0f / total;
            }
            for (int64_t i = 0; i < D; i += 64) {
                const int C = D - i < 64 ? (int)((D - i) / LANES) : 4;
                Floats acc[Q][4] = {};
                if (C == 4) {
                    for (int64_t t = 0; t < seen; t++) {
                        Floats v[4];
                        for (int c = 0; c < 4; c++) v[c] = load(values + t * D + i + c * LANES);
                        for (int j = 0; j < Q; j++) { float w = scores[j * padded + t]; for (int c = 0; c < 4; c++) acc[j][c] += v[c] * w; }
                    }
                } else {
                    for (int64_t t = 0; t < seen; t++)
                        for (int c = 0; c < C; c++) { Floats v = load(values + t * D + i + c * LANES); for (int j = 0; j < Q; j++) acc[j][c] += v * scores[j * padded + t]; }
                }
                for (int64_t j = 0; j < some; j++) {
                    T* out = (T*)p.out + ((b * L + first + j) * p.heads + h) * D + i;
                    for (int c = 0; c < C; c++) for (int e = 0; e < LANES; e++) store(out + c * LANES + e, acc[j][c][e] * over[j]);
                }
            }
        }
    }
}
#ifdef __AVX512BF16__
// Two to the power of lanes, to a few millionths (Taylor's polynomial on half a step to either side).
static inline __m512 power(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.3333558e-3f);
    static const float terms[] = {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    for (const float c : terms) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}
// C vectors of what four queries make of the values, their shares given as pairs of neighbouring tokens.
template <int C> static inline void mixed(const float* scores, int64_t stride, const uint32_t* values, int64_t D, int64_t wide, const float* over, uint16_t* out, int64_t step, int64_t rows) {
    __m512 acc[4][C] = {};
    for (int64_t t = 0; t < wide / 2; t++) {
        __m512bh v[C];
        for (int c = 0; c < C; c++) v[c] = (__m512bh)_mm512_loadu_si512(values + t * D + c * LANES);
        for (int j = 0; j < 4; j++) {
            uint32_t pair; std::memcpy(&pair, (const uint16_t*)(scores + j * stride) + 2 * t, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair);
            for (int c = 0; c < C; c++) acc[j][c] = _mm512_dpbf16_ps(acc[j][c], v[c], both);
        }
    }
    for (int64_t j = 0; j < rows; j++) for (int c = 0; c < C; c++) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(acc[j][c], _mm512_set1_ps(over[j])));
        std::memcpy(out + j * step + c * LANES, &rounded, sizeof rounded);
    }
}
// The same in bfloat16 with the instruction that multiplies and adds pairs: keys lie as pairs along a head's dimension,
// values as pairs of neighbouring tokens.
static void attend_in_pairs(const Prompt& p) {
    const int Q = 8;
    const int64_t L = p.length, D = p.dim, padded = (L + 31) / 32 * 32, each = (p.heads + 2 * p.kv_heads) * D;
    const int64_t panel = D * padded, share = p.heads / p.kv_heads, blocks = (L + Q - 1) / Q;
    const float scale = 1.0f / std::sqrt((float)D);
    uint32_t* scratch = (uint32_t*)p.scratch;
    #pragma omp parallel
    {
        #pragma omp for collapse(2)
        for (int64_t bk = 0; bk < p.batch * p.kv_heads; bk++) for (int64_t part = 0; part < padded / 32; part++) {
            const int64_t b = bk / p.kv_heads, kv = bk % p.kv_heads, start = part * 32, stop = start + 32 < L ? start + 32 : L;
            uint32_t *keys = scratch + bk * panel, *values = keys + panel / 2;
            uint16_t tile[32][256], nothing[256] = {};
            float k[256];
            const uint16_t* v[32];
            for (int64_t t = start; t < start + 32; t++) {
                if (t >= stop) { std::memset(tile[t - start], 0, D * 2); v[t - start] = nothing; continue; }
                const uint16_t* row = (const uint16_t*)p.joined + (b * L + t) * each + (p.heads + kv) * D;
                v[t - start] = row + p.kv_heads * D;
                turned(p, row, b * L + t, k);
                for (int64_t i = 0; i < D; i++) store(&tile[t - start][i], k[i]);
                if (p.key) {
                    std::memcpy((uint16_t*)p.key + (bk * L + t) * D, tile[t - start], D * 2);
                    std::memcpy((uint16_t*)p.value + (bk * L + t) * D, v[t - start], D * 2);
                }
            }
            for (int64_t i = 0; i < D / 2; i++)
                for (int64_t t = 0; t < 32; t++) std::memcpy(keys + start * D / 2 + i * 32 + t, &tile[t][2 * i], 4);
            for (int64_t t = 0; t < 32; t += 2)
                for (int64_t i = 0; i < D; i++) values[(start + t) / 2 * D + i] = v[t][i] | (uint32_t)v[t + 1][i] << 16;
        }
        float* scores = p.scratch + p.batch * p.kv_heads * panel + omp_get_thread_num() * Q * padded;
        #pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t bh = 0; bh < p.batch * p.heads; bh++) for (int64_t n = 0; n < blocks; n++) {
            const int64_t b = bh / p.heads, h = bh % p.heads, first = (blocks - 1 - n) * Q;  // the longest first
            const int64_t some = L - first < Q ? L - first : Q, seen = p.causal ? first + some : L, wide = (seen + 31) / 32 * 32;
            const uint32_t *keys = scratch + (b * p.kv_heads + h / share) * panel, *values = keys + panel / 2;
            uint16_t q[Q][256] = {};
            float turn[256], over[Q] = {};
            for (int64_t j = 0; j < some; j++) {
                turned(p, (const uint16_t*)p.joined + (b * L + first + j) * each + h * D, b * L + first + j, turn);
                for (int64_t i = 0; i < D; i++) store(&q[j][i], turn[i] * scale);
            }
            for (int64_t t = 0; t < wide; t += 32) {
                __m512 acc[Q][2] = {};
                const uint32_t* near = keys + t * D / 2;
                for (int64_t i = 0; i < D / 2; i++) {
                    const __m512bh low = (__m512bh)_mm512_loadu_si512(near + i * 32);
                    const __m512bh high = (__m512bh)_mm512_loadu_si512(near + i * 32 + LANES);
                    for (int j = 0; j < Q; j++) {
                        uint32_t pair; std::memcpy(&pair, &q[j][2 * i], 4);
                        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair);
                        acc[j][0] = _mm512_dpbf16_ps(acc[j][0], low, both);
                        acc[j][1] = _mm512_dpbf16_ps(acc[j][1], high, both);
                    }
                }
                for (int j = 0; j < Q; j++) std::memcpy(scores + j * padded + t, acc[j], sizeof acc[j]);
            }
            for (int64_t j = 0; j < some; j++) {
                float *row = scores + j * padded, top = -1e30f;
                uint16_t* shares = (uint16_t*)row;  // written behind what is still to be read
                const int64_t sees = p.causal ? first + j + 1 : L;
                for (int64_t t = sees; t < wide; t++) row[t] = -1e30f;
                Floats tops = load(row);
                for (int64_t t = LANES; t < wide; t += LANES) { Floats v = load(row + t); tops = tops > v ? tops : v; }
                for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
                __m512 all = {};
                for (int64_t t = 0; t < wide; t += LANES) {
                    const __m512 e = power(_mm512_mul_ps((__m512)(load(row + t) - top), _mm512_set1_ps(1.44269504f)));
                    const __m256bh rounded = _mm512_cvtneps_pbh(e);
                    std::memcpy(shares + t, &rounded, sizeof rounded);
                    all = _mm512_add_ps(all, e);
                }
                over[j] = 1.0f / _mm512_reduce_add_ps(all);
            }
            for (int64_t j = some; j < Q; j++) std::memset(scores + j * padded, 0, wide * 2);
            for (int half = 0; half < Q && half < some; half += 4) {
                const int64_t rows = some - half < 4 ? some - half : 4;
                uint16_t* out = (uint16_t*)p.out + ((b * L + first + half) * p.heads + h) * D;
                int64_t i = 0;
                for (; i + 64 <= D; i += 64) mixed<4>(scores + half * padded, padded, values + i, D, wide, over + half, out + i, p.heads * D, rows);
                for (; i < D; i += LANES) mixed<1>(scores + half * padded, padded, values + i, D, wide, over + half, out + i, p.heads * D, rows);
            }
        }
    }
}
#else
static void attend_in_pairs(const Prompt& p) { attend<uint16_t>(p); }
#endif
extern "C" void prompt(const Prompt* p, int64_t kind) { if (kind == 0) attend<float>(*p); else attend_in_pairs(*p); }

// out [rows, width] = x scaled to a mean square of one, times the weight.
extern "C" void normalise(const void* x, const float* weight, void* out, int64_t rows, int64_t width, double eps, int64_t kind) {
    #pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        Floats squares = {};
        float tail = 0;
        const float* a = (const float*)x + r * width;
        const uint16_t* b = (const uint16_t*)x + r * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) { Floats v = kind == 0 ? load(a + i) : load(b + i); squares += v * v; }
        for (; i < width; i++) { float v = kind == 0 ? a[i] : plain(b[i]); tail += v * v; }
        const float scale = 1.0f / std::sqrt((sum(squares) + tail) / width + (float)eps);
        if (kind == 0) { float* y = (float*)out + r * width; for (i = 0; i < width; i++) y[i] = a[i] * scale * weight[i]; }
        else { uint16_t* y = (uint16_t*)out + r * width; for (i = 0; i < width; i++) store(y + i, plain(b[i]) * scale * weight[i]); }
    }
}
