// What a decoder does on a CPU between oneDNN's large products: attention of a prompt to itself, small products, one
// decoding step, and what training needs with its gradients. Writing one token is a walk over all weights, so what counts
// is that they stream.
//
// One translation unit: the compiler sees all of it and inlines what it likes.

#include <cmath>
#include <omp.h>
#include "gradients.h"
#include "products.h"
#include "prompt.h"
#include "step.h"
#include "vectors.h"

extern "C" int threads() { return omp_get_max_threads(); }

// y [batch, outputs] = x [batch, inputs] times the weight.
extern "C" void multiply(const Matrix* m, const float* x, float* y, int64_t batch) {
    #pragma omp parallel
    product(*m, x, y, m->outputs, (int)batch, omp_get_thread_num(), omp_get_num_threads());
}

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

