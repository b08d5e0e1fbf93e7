// The loops over one sample that armor::transport_* ask for; transport.cpp compiles them by levels.h. Every kind of
// step and of cost is one function of a Sample whose arrays are in memory order and stay in the cache meanwhile. Their
// loops become vectors, conditionals included, under -fopenmp-simd and -fno-trapping-math only.

template <class R>
struct SampleLoops {
  // A step: from x_adv along grad to x_next.

  static void linf(Sample<R> s) {
    const R step_size = static_cast<R>(s.step_size), radius = static_cast<R>(s.radius);
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      s.x_next[i] = linf_step(s.x_adv[i], s.grad[i], s.x[i], step_size, radius, s.lo, s.hi);
    });
  }

  static void l2(Sample<R> s) {
    const Unit unit = unit_of(s.grad, s.n, s.grad_max);
    const R factor = static_cast<R>(s.step_size * unit.factor);
    const double length = std::sqrt(sum<R>(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      const R d = (s.x_adv[i] + factor * (s.grad[i] * unit.scale)) - s.x[i];
      s.x_next[i] = d;
      return d * d;
    }));
    const R shrink = static_cast<R>(length > s.radius ? s.radius / length : 1.0);
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      s.x_next[i] = clip(s.x[i] + shrink * s.x_next[i], s.lo, s.hi);
    });
  }

  static void l1(Sample<R> s) {
    Bits* const keys = reinterpret_cast<Bits*>(s.scratch);
    R* const caps = s.scratch + s.n;
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      keys[i] = feasible(s.x_adv[i], s.grad[i], s.lo, s.hi) ? magnitude(s.grad[i]) : 0;
    });
    const int64_t top = std::max<int64_t>(1, static_cast<int64_t>(std::floor(s.weight * static_cast<double>(s.n))));
    const Bits least = largest_but(keys, s.n, top);
    const R share = static_cast<R>(s.step_size / std::max<int64_t>(1, count(keys, s.n, least)));
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      const R d = (s.x_adv[i] + (keys[i] >= least ? along(s.grad[i], share) : R(0))) - s.x[i];
      s.x_next[i] = d;
      caps[i] = d > 0 ? s.hi - s.x[i] : s.x[i] - s.lo;
    });
    const Theta theta(multiplier(s.x_next, caps, s.n, s.radius));
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      const R d = s.x_next[i], size = shrunk(theta.left_of(d), caps[i]);
      s.x_next[i] = clip(s.x[i] + std::copysign(size, d), s.lo, s.hi);
    });
  }

  static void norm_power(Sample<R> s) {
    const double length = length_of(s);
    const auto d = [=](int64_t i) ARMOR_INLINE_LAMBDA { return s.x_adv[i] - s.x[i]; };
    const double slope = length > 0.0 ? s.mu * s.weight * s.power * std::pow(length, s.power - 1.0) : 0.0;
    if (s.norm == 2) {
      const R pull = finite(length > 0.0 ? slope / length : 0.0);
      climb(s, [=](int64_t i) ARMOR_INLINE_LAMBDA { return s.grad[i] - pull * d(i); });
    } else if (s.norm == 1) {
      const R pull = finite(slope);
      climb(s, [=](int64_t i) ARMOR_INLINE_LAMBDA { return s.grad[i] - along(d(i), pull); });
    } else {
      const R peak = static_cast<R>(length);
      const R pull = finite(slope / sum<R>(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
        return std::fabs(d(i)) == peak ? R(1) : R(0);
      }));
      climb(s, [=](int64_t i) ARMOR_INLINE_LAMBDA {
        return s.grad[i] - (std::fabs(d(i)) == peak ? along(d(i), pull) : R(0));
      });
    }
  }

  static void soft_ball(Sample<R> s) {
    const R step_size = static_cast<R>(s.step_size), radius = static_cast<R>(s.radius);
    const R rate = finite(s.step_size * s.mu / s.weight);
    const bool early = s.variant == 1;
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      s.x_next[i] =
          clip(soft_ball_step(s.x_adv[i], s.grad[i], s.x[i], step_size, rate, radius, early), s.lo, s.hi);
    });
  }

  static void binary(Sample<R> s) {
    along_sign(s, [=](int64_t i) ARMOR_INLINE_LAMBDA { return s.grad[i]; });
  }

  // The end of `binary`: x_next is rounded at random, and ones of x stay.
  static void round(Sample<R> s, const R* uniforms) {
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      const R one = s.x_next[i] > uniforms[i] ? R(1) : R(0);
      s.x_next[i] = one < s.x[i] ? s.x[i] : one;
    });
  }

  // The cost of x_adv.

  static double ball_cost(Sample<R> s) {
    const double length = length_of(s), slack = s.slack * std::fmax(largest(s.x_adv, s.n), largest(s.x, s.n));
    if (std::isnan(length)) return NAN;
    return length <= s.radius + slack && inside(s.x_adv, s.n, s.lo, s.hi) ? 0.0 : kInf;
  }

  static double norm_power_cost(Sample<R> s) { return s.weight * std::pow(length_of(s), s.power); }

  static double soft_ball_cost(Sample<R> s) {
    return sum<double>(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      return square(beyond(double(s.x_adv[i]) - double(s.x[i]), s.radius));
    }) / (2.0 * s.weight);
  }

  static double binary_cost(Sample<R> s) {
    if (std::isnan(length_of(s))) return NAN;
    return sum<double>(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      const R v = s.x_adv[i];
      return ((v == 0) | (v == 1)) & (v >= s.x[i]) ? 0.0 : kInf;
    });
  }

  // Noise of the given radius in logical order. It is stored before it is added to x, so no fused multiply-add can make
  // it depend on the processor. `words` and `out` hold up to three elements more than n.

  static void uniforms(uint64_t seed, Stream stream, int64_t n, uint32_t* words, R* out) {
    draw(seed, stream, n, words);
    each(n, [=](int64_t j) ARMOR_INLINE_LAMBDA { out[j] = uniform(words[j]); });
  }

  static void linf_noise(uint64_t seed, double radius, int64_t n, uint32_t* words, R* out) {
    const R r = static_cast<R>(radius);
    draw(seed, Stream::noise, n, words);
    each(n, [=](int64_t j) ARMOR_INLINE_LAMBDA { out[j] = (2.0f * uniform(words[j]) - 1.0f) * r; });
  }

  static void l2_noise(uint64_t seed, double radius, int64_t n, uint32_t* words, R* out) {
    gaussian_noise(seed, 1.0, n, words, out);
    const double squares = sum<double>(n, [=](int64_t j) ARMOR_INLINE_LAMBDA { return square(out[j]); });
    scale(out, n, radius / std::sqrt(squares + 2.0 * extra(seed)));
  }

  static void l1_noise(uint64_t seed, double radius, int64_t n, uint32_t* words, R* out) {
    draw(seed, Stream::noise, n, words);
    each(n, [=](int64_t j) ARMOR_INLINE_LAMBDA {
      const float size = exponential(uniform(words[j]));
      out[j] = words[j] & 1 ? -size : size;
    });
    const double total = sum<double>(n, [=](int64_t j) ARMOR_INLINE_LAMBDA { return std::fabs(double(out[j])); });
    scale(out, n, radius / (total + extra(seed)));
  }

  static void gaussian_noise(uint64_t seed, double sigma, int64_t n, uint32_t* words, R* out) {
    const R r = static_cast<R>(sigma);
    draw(seed, Stream::noise, n, words);
    each((n + 1) / 2, [=](int64_t j) ARMOR_INLINE_LAMBDA {
      const Circle pair = gaussians(words[2 * j], words[2 * j + 1]);
      out[2 * j] = pair.cos * r;
      out[2 * j + 1] = pair.sin * r;
    });
  }

  // What every kind needs.

  template <class From>
  static void load(const void* from, R* to, int64_t n) {
    const From* const in = static_cast<const From*>(from);
    each(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { to[i] = static_cast<R>(in[i]); });
  }

  template <class To>
  static void store(const R* from, void* to, int64_t n) {
    To* const out = static_cast<To*>(to);
    each(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { out[i] = static_cast<To>(from[i]); });
  }

  static void add(const R* x, const R* noise, int64_t n, R lo, R hi, R* out) {
    each(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { out[i] = clip(x[i] + noise[i], lo, hi); });
  }

  // (from - mean) / std; no mean is zero.
  static void normalise(const R* from, const R* mean, const R* std, int64_t n, R* out) {
    if (mean) each(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { out[i] = (from[i] - mean[i]) / std[i]; });
    else each(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { out[i] = from[i] / std[i]; });
  }

  // max |v|; NaN if an entry is.
  static R largest(const R* v, int64_t n) {
    return norm<0>(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { return v[i]; });
  }

  static bool inside(const R* v, int64_t n, R lo, R hi) {
    const double within = sum<Bits>(n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      return (v[i] >= lo) & (v[i] <= hi) ? 1 : 0;
    });
    return within == static_cast<double>(n);
  }

 private:
  using Bits = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  static constexpr int64_t kBlock = 512;

  template <class Body>
  static ARMOR_INLINE void each(int64_t n, const Body& body) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) body(i);
  }

  // By blocks, so that the error does not grow with n; in two chains, because each has to wait for its last addition.
  template <class Part, class Term>
  static ARMOR_INLINE double sum(int64_t n, const Term& term) {
    double total = 0.0;
    int64_t begin = 0;
    for (; begin + 2 * kBlock <= n; begin += 2 * kBlock) {
      Part a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
      for (int64_t i = begin; i < begin + kBlock; ++i) {
        a += term(i);
        b += term(i + kBlock);
      }
      total += static_cast<double>(a) + static_cast<double>(b);
    }
    Part rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t i = begin; i < n; ++i) rest += term(i);
    return total + static_cast<double>(rest);
  }

  // The bit pattern of |v|, which is ordered as |v| is; NaN is on top of infinity.
  static ARMOR_INLINE Bits magnitude(R v) {
    Bits bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits & std::numeric_limits<Bits>::max();
  }

  static ARMOR_INLINE R real(Bits magnitude) {
    R v;
    std::memcpy(&v, &magnitude, sizeof v);
    return v;
  }

  // The p-norm of d(i); 0 means inf. NaN if an entry is.
  template <int p, class D>
  static ARMOR_INLINE R norm(int64_t n, const D& d) {
    if constexpr (p == 1) return sum<R>(n, [&](int64_t i) ARMOR_INLINE_LAMBDA { return std::fabs(d(i)); });
    if constexpr (p == 2) return std::sqrt(sum<R>(n, [&](int64_t i) ARMOR_INLINE_LAMBDA { return d(i) * d(i); }));
    Bits top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) {
      const Bits m = magnitude(d(i));
      top = m > top ? m : top;
    }
    return real(top);
  }

  static double length_of(Sample<R> s) {
    const auto d = [=](int64_t i) ARMOR_INLINE_LAMBDA { return s.x_adv[i] - s.x[i]; };
    return s.norm == 2 ? norm<2>(s.n, d) : s.norm == 1 ? norm<1>(s.n, d) : norm<0>(s.n, d);
  }

  // The step along v(i), in the box only.
  template <class V>
  static ARMOR_INLINE void climb(Sample<R> s, const V& v) {
    s.variant == 0 ? along_sign(s, v) : along_direction(s, v);
  }

  template <class V>
  static ARMOR_INLINE void along_sign(Sample<R> s, const V& v) {
    const R step_size = static_cast<R>(s.step_size);
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      s.x_next[i] = clip(s.x_adv[i] + along(v(i), step_size), s.lo, s.hi);
    });
  }

  template <class V>
  static ARMOR_INLINE void along_direction(Sample<R> s, const V& v) {
    R* const ascent = s.scratch;
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA { ascent[i] = v(i); });
    const Unit unit = unit_of(ascent, s.n, largest(ascent, s.n));
    const R factor = static_cast<R>(s.step_size * unit.factor);
    each(s.n, [=](int64_t i) ARMOR_INLINE_LAMBDA {
      s.x_next[i] = clip(s.x_adv[i] + factor * (ascent[i] * unit.scale), s.lo, s.hi);
    });
  }

  // v / ||v||_2 is factor * (v * scale): no square of v * scale leaves the range of R.
  struct Unit {
    double factor;
    R scale;
  };

  static Unit unit_of(const R* v, int64_t n, R top) {
    int exponent = 0;
    std::frexp(top, &exponent);
    const int limit = std::numeric_limits<R>::max_exponent - 2;
    const R scale = std::ldexp(R(1), -std::min(std::max(exponent, -limit), limit));
    const double length = norm<2>(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { return v[i] * scale; });
    return {length > 0.0 ? 1.0 / length : 0.0, scale};
  }

  static ARMOR_INLINE R finite(double v) {
    return static_cast<R>(std::fmin(v, static_cast<double>(std::numeric_limits<R>::max())));
  }

  static void scale(R* v, int64_t n, double factor) {
    const R f = static_cast<R>(factor);
    each(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { v[i] *= f; });
  }

  static int64_t count(const Bits* keys, int64_t n, Bits least) {
    return static_cast<int64_t>(sum<Bits>(n, [=](int64_t i) ARMOR_INLINE_LAMBDA { return keys[i] >= least ? 1 : 0; }));
  }

  // The least positive key among the `top` largest, or one that separates them from the rest: by bisection, because
  // counting is one pass of vectors over the cache.
  static Bits largest_but(const Bits* keys, int64_t n, int64_t top) {
    if (count(keys, n, 1) <= top) return 1;
    Bits low = 1, high = std::numeric_limits<Bits>::max();  // count(low) > top > count(high)
    while (high - low > 1) {
      const Bits middle = low + (high - low) / 2;
      const int64_t above = count(keys, n, middle);
      if (above == top) return middle;
      (above > top ? low : high) = middle;
    }
    return low;
  }

  // theta with sum shrunk(|d|, theta, cap) = radius, or 0 if the sum is not above it anyway. The sum is piecewise
  // linear and falls; Newton's method finds the piece, kept inside a bracket because caps make it lose convexity.
  static double multiplier(const R* d, const R* caps, int64_t n, double radius) {
    double low = 0.0, high = largest(d, n), theta = 0.0;
    for (int round = 0; round < kMaxRounds; ++round) {
      const Mass at = mass(d, caps, n, theta);
      const double excess = at.mass - radius;
      if (!(theta > 0.0 ? std::fabs(excess) > kTolerance * radius : excess > 0.0)) return theta;
      (excess > 0.0 ? low : high) = theta;
      const double newton = theta + excess / at.active;
      if (newton == theta) return excess > 0.0 ? std::nextafter(theta, high) : theta;
      theta = newton > low && newton < high ? newton : 0.5 * (low + high);
      if (!(theta > low && theta < high)) break;
    }
    return high;
  }

  struct Mass {
    double mass, active;
  };
  static constexpr int kMaxRounds = 100;
  static constexpr double kTolerance = sizeof(R) == 4 ? 1e-7 : 1e-15;

  // theta in two parts, so that what it leaves of a displacement keeps its digits in R.
  struct Theta {
    R high, low;
    explicit Theta(double theta) : high(static_cast<R>(theta)), low(static_cast<R>(theta - high)) {}
    ARMOR_INLINE R left_of(R d) const { return (std::fabs(d) - high) - low; }
  };

  // The sum at theta, and minus its slope there.
  static Mass mass(const R* d, const R* caps, int64_t n, double theta_) {
    const Theta theta(theta_);
    Mass all{0.0, 0.0};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = std::min(n, begin + kBlock);
      double mass = 0.0;
      R active = 0;
#pragma omp simd reduction(+ : mass, active)
      for (int64_t i = begin; i < end; ++i) {
        const R left = theta.left_of(d[i]), part = shrunk(left, caps[i]);
        mass += part;
        active += part == left ? R(1) : R(0);
      }
      all.mass += mass, all.active += active;
    }
    return all;
  }

  static double extra(uint64_t seed) { return exponential(uniform(philox(seed, 0, Stream::extra).w0)); }

  static void draw(uint64_t seed, Stream stream, int64_t n, uint32_t* words) {
    each((n + 3) / 4, [=](int64_t c) ARMOR_INLINE_LAMBDA {
      const Words w = philox(seed, static_cast<uint64_t>(c), stream);
      words[4 * c] = w.w0, words[4 * c + 1] = w.w1, words[4 * c + 2] = w.w2, words[4 * c + 3] = w.w3;
    });
  }
};
