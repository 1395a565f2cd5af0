// Attention of a prompt to itself.
#pragma once
#include <cmath>
#include <omp.h>
#include "vectors.h"

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
