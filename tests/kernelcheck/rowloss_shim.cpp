// The kernels of csrc/cuda/rowloss.cuh under the host shim (cuemu.h), as the library that tests/test_rowloss_cuda.py
// calls.

#include "rowloss_shim.h"

using namespace shim;

extern "C" {

#define EXPORT(L, T)                                                                                                   \
  const char* rowloss_##L(int blocks, int order, uint64_t seed, int resident, const L* logits, const L* natural,       \
                          const int64_t* target, T* losses, T* stats, int64_t rows, int64_t classes, int kind,         \
                          double beta, double smoothing, int64_t ignore_index) {                                       \
    const How how{static_cast<unsigned>(blocks),                                                                       \
                  {static_cast<cuemu::Order>(order), seed, static_cast<unsigned>(resident)}};                          \
    const LossSettings settings{static_cast<Loss>(kind), beta, smoothing, ignore_index};                               \
    const Rowlosses<L, T> all{logits, natural, target, losses, stats, rows, classes, settings};                        \
    return report([&] { how.launch(rowloss<L, T>, all); });                                                            \
  }                                                                                                                    \
  const char* rowloss_backward_##L(int blocks, int order, uint64_t seed, int resident, const T* grad,                  \
                                   const T* weights, const L* logits, const L* natural, const int64_t* target,         \
                                   const T* stats, L* to_logits, L* to_natural, int64_t rows, int64_t classes,         \
                                   int64_t samples, int kind, double beta, double smoothing, int64_t ignore_index) {   \
    const How how{static_cast<unsigned>(blocks),                                                                       \
                  {static_cast<cuemu::Order>(order), seed, static_cast<unsigned>(resident)}};                          \
    const LossSettings settings{static_cast<Loss>(kind), beta, smoothing, ignore_index};                               \
    const RowlossGradients<L, T> all{grad,      weights,    logits, natural, target,  stats,                           \
                                     to_logits, to_natural, rows,   classes, samples, settings};                       \
    return report([&] { how.launch(rowloss_backward<L, T>, all); });                                                   \
  }                                                                                                                    \
  const char* rowloss_dual_##L(int groups, int blocks, int order, uint64_t seed, const L* logits, const L* natural,    \
                               const int64_t* target, const T* costs, T* losses, T* stats, T* value, T* lam, T* nu,    \
                               T* weights, int* status, int* passes, int64_t rows, int64_t n, int64_t classes,         \
                               int kind, double beta, double smoothing, int divergence, double alpha, double radius) { \
    const How how{static_cast<unsigned>(blocks), {static_cast<cuemu::Order>(order), seed}};                            \
    const LossSettings settings{static_cast<Loss>(kind), beta, smoothing, kIgnoreNothing};                             \
    const Rowlosses<L, T> all{logits, natural, target, losses, stats, rows * n, classes, settings};                    \
    const Settings dual = dual_settings(divergence, alpha, radius, sizeof(T) == 8, costs);                             \
    const Rows<T> solved{losses, costs, nullptr, value, lam, nu, weights, status, passes, rows, n, dual};              \
    return report([&] { solve(how, static_cast<Groups>(groups), all, solved); });                                      \
  }

EXPORT(__half, float)
EXPORT(__nv_bfloat16, float)
EXPORT(float, float)
EXPORT(double, double)
#undef EXPORT

// The shim's own 16-bit types, for tests/test_kernelcheck.py.
void half_to_float(const __half* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __half2float(from[i]);
}
void float_to_half(const float* from, __half* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __float2half_rn(from[i]);
}
void bfloat16_to_float(const __nv_bfloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __bfloat162float(from[i]);
}
void float_to_bfloat16(const float* from, __nv_bfloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __float2bfloat16_rn(from[i]);
}

}  // extern "C"
