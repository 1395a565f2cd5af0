// What training does on a CPU between the products, each with its gradient as one pass over memory: torch's own are
// chains of passes. Sums are kept in float; plain loops that the compiler turns into vectors.

#pragma once
#include <cmath>
#include <omp.h>
#include "vectors.h"

namespace gradients {

// 1 / (1 + e^-x), to a few millionths.
static inline float sigmoid(float x) {
    const float size = x < 0 ? -x : x, away = size < 87.0f ? size : 87.0f;  // e^-|x| neither overflows nor vanishes
    const int whole = (int)(-away * 1.44269504f - 0.5f);  // towards zero, so to the nearest
    const float r = -away - whole * 0.693359375f + whole * 2.12194440e-4f;
    const float y = (((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
                  + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r + r + 1.0f;
    const int32_t bits = (whole + 127) << 23;
    float power; std::memcpy(&power, &bits, sizeof power);
    const float e = y * power;
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// out [rows, width] = silu(gate) * up, both side by side in joined [rows, 2 width].
template <class T> static void gated(const T* joined, T* out, int64_t rows, int64_t width) {
    #pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = joined + 2 * r * width, *up = gate + width;
        T* y = out + r * width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) { const float g = plain(gate[i]); store(y + i, g * sigmoid(g) * plain(up[i])); }
    }
}
// The gradient of joined from that of out.
template <class T> static void gated_back(const T* joined, const T* grad, T* out, int64_t rows, int64_t width) {
    #pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = joined + 2 * r * width, *up = gate + width, *d = grad + r * width;
        T *to_gate = out + 2 * r * width, *to_up = to_gate + width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float g = plain(gate[i]), s = sigmoid(g), along = plain(d[i]);
            store(to_gate + i, along * plain(up[i]) * s * (1.0f + g * (1.0f - s)));
            store(to_up + i, along * g * s);
        }
    }
}

// out [count] = x sigmoid(c x), OpenAI's GELU; and the gradient of x from that of out.
template <class T> static void quick(const T* x, T* out, int64_t count, float c) {
    #pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) { const float v = plain(x[i]); store(out + i, v * sigmoid(c * v)); }
}
template <class T> static void quick_back(const T* x, const T* grad, T* out, int64_t count, float c) {
    #pragma omp parallel for simd
    for (int64_t i = 0; i < count; i++) {
        const float v = c * plain(x[i]), s = sigmoid(v);
        store(out + i, plain(grad[i]) * s * (1.0f + v * (1.0f - s)));
    }
}

// Heads [batch, heads, length, dim] turned by tables [batch or 1, length, dim] whose halves are alike; `sign` -1 turns
// them back. Steps between batches, heads and tokens are those of where they lie.
struct Turn { int64_t batch, heads, length, dim, from[3], to[3], tables; };
template <class T> static void turned(const Turn& t, const T* x, const float* cos, const float* sin, float sign, T* out) {
    const int64_t half = t.dim / 2;
    #pragma omp parallel for collapse(2)
    for (int64_t b = 0; b < t.batch; b++)
        for (int64_t n = 0; n < t.length; n++) {
            const float *c = cos + b * t.tables + n * t.dim, *s = sin + b * t.tables + n * t.dim;
            for (int64_t h = 0; h < t.heads; h++) {
                const T* a = x + b * t.from[0] + h * t.from[1] + n * t.from[2];
                T* y = out + b * t.to[0] + h * t.to[1] + n * t.to[2];
                for (int64_t i = 0; i < half; i++) {
                    const float one = plain(a[i]), two = plain(a[half + i]), turn = sign * s[i];
                    store(y + i, one * c[i] - two * turn);
                    store(y + half + i, two * c[i] + one * turn);
                }
            }
        }
}

// out [rows, width] = x scaled to a mean square of one, times the weight; scale [rows], if not null, is kept for
// the gradient.
template <class T> static void normed(const T* x, const float* weight, float* scale, T* out, int64_t rows, int64_t width, float eps) {
    #pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const T* a = x + r * width;
        float squares = 0;
        for (int64_t i = 0; i < width; i++) squares += plain(a[i]) * plain(a[i]);
        const float by = 1.0f / std::sqrt(squares / width + eps);
        if (scale != nullptr) scale[r] = by;
        for (int64_t i = 0; i < width; i++) store(out + r * width + i, plain(a[i]) * by * weight[i]);
    }
}
// The gradient of x, and of the weight in shares [threads, width] where they are asked for.
template <class T> static void normed_back(const T* x, const float* weight, const float* scale, const T* grad, T* out, float* shares, int64_t rows, int64_t width) {
    #pragma omp parallel
    {
        float* mine = shares == nullptr ? nullptr : shares + omp_get_thread_num() * width;
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T *a = x + r * width, *d = grad + r * width;
            const float by = scale[r];
            float along = 0;
            for (int64_t i = 0; i < width; i++) along += plain(d[i]) * weight[i] * plain(a[i]);
            along *= by * by / width;
            for (int64_t i = 0; i < width; i++) store(out + r * width + i, by * (plain(d[i]) * weight[i] - plain(a[i]) * along));
            if (mine != nullptr) for (int64_t i = 0; i < width; i++) mine[i] += plain(d[i]) * plain(a[i]) * by;
        }
    }
}

}  // namespace gradients

typedef uint16_t Half;
extern "C" void silu_gated(const void* joined, void* out, int64_t rows, int64_t width, int64_t kind) {
    if (kind == 0) gradients::gated((const float*)joined, (float*)out, rows, width);
    else gradients::gated((const Half*)joined, (Half*)out, rows, width);
}
extern "C" void silu_gated_back(const void* joined, const void* grad, void* out, int64_t rows, int64_t width, int64_t kind) {
    if (kind == 0) gradients::gated_back((const float*)joined, (const float*)grad, (float*)out, rows, width);
    else gradients::gated_back((const Half*)joined, (const Half*)grad, (Half*)out, rows, width);
}
extern "C" void quick_gelu(const void* x, void* out, int64_t count, double c, int64_t kind) {
    if (kind == 0) gradients::quick((const float*)x, (float*)out, count, (float)c);
    else gradients::quick((const Half*)x, (Half*)out, count, (float)c);
}
extern "C" void quick_gelu_back(const void* x, const void* grad, void* out, int64_t count, double c, int64_t kind) {
    if (kind == 0) gradients::quick_back((const float*)x, (const float*)grad, (float*)out, count, (float)c);
    else gradients::quick_back((const Half*)x, (const Half*)grad, (Half*)out, count, (float)c);
}
extern "C" void turn(const gradients::Turn* t, const void* x, const float* cos, const float* sin, double sign, void* out, int64_t kind) {
    if (kind == 0) gradients::turned(*t, (const float*)x, cos, sin, (float)sign, (float*)out);
    else gradients::turned(*t, (const Half*)x, cos, sin, (float)sign, (Half*)out);
}
extern "C" void norm(const void* x, const float* weight, float* scale, void* out, int64_t rows, int64_t width, double eps, int64_t kind) {
    if (kind == 0) gradients::normed((const float*)x, weight, scale, (float*)out, rows, width, (float)eps);
    else gradients::normed((const Half*)x, weight, scale, (Half*)out, rows, width, (float)eps);
}
extern "C" void norm_back(const void* x, const float* weight, const float* scale, const void* grad, void* out, float* shares, int64_t rows, int64_t width, int64_t kind) {
    if (kind == 0) gradients::normed_back((const float*)x, weight, scale, (const float*)grad, (float*)out, shares, rows, width);
    else gradients::normed_back((const Half*)x, weight, scale, (const Half*)grad, (Half*)out, shares, rows, width);
}
