// What a decoder does on a CPU between oneDNN's large products: attention of a prompt to itself, small products, one
// decoding step, and what training needs with its gradients. Writing one token is a walk over all weights, so what counts
// is that they stream.
//
// One translation unit: the compiler sees all of it and inlines what it likes.

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
