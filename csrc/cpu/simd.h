// Eight float64 lanes, and the two transcendental functions that the dual needs on them. Written with the vector
// extensions of GCC and Clang, so one text serves AVX-512 (one register), AVX2 (two), SSE2 and NEON (four).
// No include guard and no includes: levels.h includes this once per instruction set, because a vector is broken into
// registers where its function is compiled, before anything is inlined.

namespace simd {

constexpr int kLanes = 8;
typedef double Vec __attribute__((vector_size(8 * kLanes)));
typedef int64_t Mask __attribute__((vector_size(8 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

ARMOR_INLINE Vec splat(double x) { return Vec{} + x; }
ARMOR_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
ARMOR_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
ARMOR_INLINE Mask first_lanes(int count) { return Mask{0, 1, 2, 3, 4, 5, 6, 7} < count; }

ARMOR_INLINE Vec load(const double* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
ARMOR_INLINE Vec load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Vec);
}
ARMOR_INLINE void store(double* to, Vec v) { std::memcpy(to, &v, sizeof v); }
ARMOR_INLINE void store(float* to, Vec v) {
  const Floats f = __builtin_convertvector(v, Floats);
  std::memcpy(to, &f, sizeof f);
}
// The last, partial vector of a row: absent lanes hold `fill`.
template <class T>
ARMOR_INLINE Vec load(const T* from, int count, double fill) {
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? from[i] : static_cast<T>(fill);
  return load(lanes);
}
template <class T>
ARMOR_INLINE void store(T* to, Vec v, int count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

ARMOR_INLINE double total(Vec v) {
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

ARMOR_INLINE Vec from_bits(Mask m) {
  Vec v;
  std::memcpy(&v, &m, sizeof v);
  return v;
}
ARMOR_INLINE Mask to_bits(Vec v) {
  Mask m;
  std::memcpy(&m, &v, sizeof m);
  return m;
}

// exp(x) for x <= 0: 2^n times the Taylor polynomial of exp(r), |r| <= log(2)/2. Below -708 it is zero.
ARMOR_INLINE Vec exp(Vec x) {
  constexpr double round_bias = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  const Vec shifted = x * 1.4426950408889634 + round_bias;
  const Vec n = shifted - round_bias;
  const Vec r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Vec poly = splat(1.0 / 6227020800.0);
  constexpr double reciprocal_factorial[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                             1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                             1.0 / 24,        1.0 / 6,        1.0 / 2,       1.0, 1.0};
  for (double c : reciprocal_factorial) poly = poly * r + c;
  const Vec scale = from_bits((to_bits(shifted) << 52) + to_bits(splat(1.0)));
  return x > -708.0 ? poly * scale : Vec{};
}

// log(1 + x) for x > -1, given u = 1 + x and its reciprocal: log u by atanh series, plus what rounding u lost.
ARMOR_INLINE Vec log1p(Vec x, Vec u, Vec reciprocal) {
  const Vec lost = (x - (u - 1.0)) * reciprocal;
  // u = m 2^e with m in [sqrt(1/2), sqrt(2)); e goes from integer to double through the mantissa of 2^52, because
  // AVX2 has no such conversion
  typedef uint64_t Bits __attribute__((vector_size(8 * kLanes)));
  const Mask one = to_bits(splat(1.0));
  const Mask biased = (Mask)((Bits)(to_bits(u) + one - to_bits(splat(0.70710678118654752440))) >> 52);
  const Vec e = from_bits(biased | to_bits(splat(4503599627370496.0))) - (4503599627370496.0 + 1023.0);
  const Vec m = from_bits(to_bits(u) - (biased << 52) + one);
  const Vec s = (m - 1.0) / (m + 1.0), s2 = s * s;
  Vec series = splat(1.0 / 23.0);
  constexpr double reciprocal_odd[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                                       1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
  for (double c : reciprocal_odd) series = series * s2 + c;
  const Vec twice = s + s;
  return e * 6.93147180369123816490e-01 + (twice + (twice * s2 * series + (e * 1.90821492927058770002e-10 + lost)));
}

}  // namespace simd
