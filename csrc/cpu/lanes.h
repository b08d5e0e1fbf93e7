// Vectors of the compute types, sixteen float32 or eight float64 lanes, under common names, and float16 and bfloat16
// memory as float32 lanes. For loops over the classes of a row (rowloss_row.h). As in simd.h, which must come first,
// there is no include guard, because levels.h includes this once per instruction set.

namespace lanes {

template <class R>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = 16;
  typedef float Vec __attribute__((vector_size(64)));
  typedef int32_t Mask __attribute__((vector_size(64)));
  static ARMOR_INLINE Mask numbers() { return Mask{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
};

template <>
struct Lanes<double> {
  static constexpr int kCount = simd::kLanes;
  typedef simd::Vec Vec;
  typedef simd::Mask Mask;
  static ARMOR_INLINE Mask numbers() { return Mask{0, 1, 2, 3, 4, 5, 6, 7}; }
};

using Floats = Lanes<float>::Vec;
using Doubles = Lanes<double>::Vec;
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

template <class To, class From>
ARMOR_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- memory -------------------------------------------------------------------------------------------------------

template <class Vec, class T>
ARMOR_INLINE Vec read(const T* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

ARMOR_INLINE Floats load(const float* from) { return read<Floats>(from); }
ARMOR_INLINE Doubles load(const double* from) { return read<Doubles>(from); }
ARMOR_INLINE Floats load(const BFloat16* from) {
  return bits_of<Floats>(__builtin_convertvector(read<Shorts>(from), Bits) << 16);
}
// The exponent of float16 is rebiased by an addition; subnormals borrow an implicit one, which is subtracted again.
ARMOR_INLINE Floats load(const Half* from) {
  const Bits half = __builtin_convertvector(read<Shorts>(from), Bits), magnitude = (half & 0x7fff) << 13;
  const Bits smallest = Bits{} + 0x38800000, unit = Bits{} + 0x00800000;
  const Bits finite = magnitude + 0x38000000, odd = magnitude + 0x70000000;
  const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude + smallest) - bits_of<Floats>(smallest));
  const Bits absolute = magnitude < unit ? subnormal : magnitude >= 0x0f800000 ? odd : finite;
  return bits_of<Floats>(absolute | (half & 0x8000) << 16);
}

ARMOR_INLINE void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
ARMOR_INLINE void store(double* to, Doubles v) { std::memcpy(to, &v, sizeof v); }
ARMOR_INLINE void store(BFloat16* to, Floats v) {
  const Bits bits = bits_of<Bits>(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Shorts out = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Shorts);
  std::memcpy(to, &out, sizeof out);
}
// To nearest, ties to even. Subnormals are rounded by an addition that leaves their digits in the lowest bits.
ARMOR_INLINE void store(Half* to, Floats v) {
  const Bits bits = bits_of<Bits>(v), magnitude = bits & 0x7fffffff, aligned = Bits{} + 0x3f000000;
  const Bits normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude) + bits_of<Floats>(aligned)) - aligned;
  const Bits odd = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits half = magnitude >= 0x47800000 ? odd : magnitude < 0x38800000 ? subnormal : normal;
  const Shorts out = __builtin_convertvector(half | (bits & 0x80000000) >> 16, Shorts);
  std::memcpy(to, &out, sizeof out);
}

// ---- over the lanes -----------------------------------------------------------------------------------------------

template <class Vec>
ARMOR_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

ARMOR_INLINE Doubles widened(Doubles v) { return v; }
ARMOR_INLINE Doubles widened(Floats v) {
  typedef float Part __attribute__((vector_size(32)));
  Part parts[2];
  std::memcpy(parts, &v, sizeof v);
  return __builtin_convertvector(parts[0], Doubles) + __builtin_convertvector(parts[1], Doubles);
}

// All lanes folded into one, halves onto each other.
template <class R, int count, class Vec, class Fold>
ARMOR_INLINE R folded(const Vec& v, const Fold& fold) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    typedef R Part __attribute__((vector_size(sizeof(R) * count / 2)));
    Part parts[2];
    std::memcpy(parts, &v, sizeof v);
    return folded<R, count / 2>(fold(parts[0], parts[1]), fold);
  }
}
ARMOR_INLINE double total(Doubles v) {
  return folded<double, 8>(v, [](auto a, auto b) ARMOR_INLINE_LAMBDA { return a + b; });
}
template <class R>
ARMOR_INLINE R largest(typename Lanes<R>::Vec v) {
  return folded<R, Lanes<R>::kCount>(v, [](auto a, auto b) ARMOR_INLINE_LAMBDA { return a > b ? a : b; });
}
template <class R>
ARMOR_INLINE int64_t smallest(typename Lanes<R>::Mask v) {
  using Index = std::decay_t<decltype(v[0])>;
  return folded<Index, Lanes<R>::kCount>(v, [](auto a, auto b) ARMOR_INLINE_LAMBDA { return a < b ? a : b; });
}

// ---- functions ----------------------------------------------------------------------------------------------------

// factor * exp(x) for x <= 0; exp is 2^n times a polynomial in r = x - n log 2, to 1 ulp. Below -87 it is zero. The
// factor is inside the selection, where no compiler fuses it into a subtraction that follows: equals must cancel.
ARMOR_INLINE Floats exp(Floats x, float factor = 1.0f) {
  constexpr float round_bias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats shifted = x * 1.44269504088896341f + round_bias, n = shifted - round_bias;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats poly = Floats{} + 1.9875691500e-4f;
  constexpr float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                    5.0000001201e-1f};
  for (float c : coefficients) poly = poly * r + c;
  poly = poly * (r * r) + r + 1.0f;
  const Bits scale = (bits_of<Bits>(shifted) << 23) + 0x3f800000;
  return x < -87.0f ? Floats{} : poly * bits_of<Floats>(scale) * factor;
}
ARMOR_INLINE Doubles exp(Doubles x, double factor = 1.0) { return x == x ? simd::exp(x) * factor : x; }

// log(1 + t) for t in [0, 1]: 2 atanh(t / (2 + t)).
template <class R>
ARMOR_INLINE typename Lanes<R>::Vec log1p(typename Lanes<R>::Vec t) {
  constexpr int terms = sizeof(R) == 4 ? 8 : 17;
  const auto s = t / (t + R(2)), s2 = s * s;
  typename Lanes<R>::Vec series{};
  for (int k = terms - 1; k > 0; --k) series = (series + R(1) / R(2 * k + 1)) * s2;
  return R(2) * (s + s * series);
}

}  // namespace lanes
