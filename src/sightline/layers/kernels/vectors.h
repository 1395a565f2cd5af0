// Vectors of 16 floats, the compiler's own, so the same source serves AVX-512, AVX2 and NEON; bf16 and int8 widen as they
// are loaded.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

static const int LANES = 16;

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
