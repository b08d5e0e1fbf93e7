// The host shim's own 16-bit types (cuemu.h), as the library that tests/test_kernelcheck.py calls.

#include "cuemu.h"

extern "C" {

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
