// armor::transport_* on the CPU (docs/math.md, section 5). A sample is one thread's: read once from memory, worked on
// in the cache, written once. So results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "armor/transport.h"

namespace armor::cpu {
namespace {

using namespace armor::transport;
using torch::headeronly::BFloat16;
using torch::headeronly::CppTypeToScalarType;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// One sample, in memory order, and the rule by which it moves.
template <class R>
struct Sample {
  const R *x_adv, *grad, *x;
  R *x_next, *scratch;  // scratch holds 2 n
  int64_t n;
  R lo, hi, grad_max;  // grad_max = max |grad|
  double radius, mu, step_size, weight, power, slack;  // a ball's radius may be exceeded by slack max |x|
  int norm, variant;
};

#define ARMOR_LOOPS "transport_loops.h"
#include "levels.h"

template <class R>
struct Loops {
  void (*step[6])(Sample<R>);
  double (*cost[6])(Sample<R>);
  void (*noise[4])(uint64_t, double, int64_t, uint32_t*, R*);
  void (*load[4])(const void*, R*, int64_t);  // by dtype_index
  void (*store[4])(const R*, void*, int64_t);
  void (*round)(Sample<R>, const R*);
  void (*uniforms)(uint64_t, Stream, int64_t, uint32_t*, R*);
  void (*add)(const R*, const R*, int64_t, R, R, R*);
  void (*normalise)(const R*, const R*, const R*, int64_t, R*);
  R (*largest)(const R*, int64_t);
  bool (*inside)(const R*, int64_t, R, R);

  template <class L>
  static Loops of() {
    return {{L::linf, L::l2, L::l1, L::norm_power, L::soft_ball, L::binary},
            {L::ball_cost, L::ball_cost, L::ball_cost, L::norm_power_cost, L::soft_ball_cost, L::binary_cost},
            {L::linf_noise, L::l2_noise, L::l1_noise, L::gaussian_noise},
            {L::template load<Half>, L::template load<BFloat16>, L::template load<float>, L::template load<double>},
            {L::template store<Half>, L::template store<BFloat16>, L::template store<float>, L::template store<double>},
            L::round, L::uniforms, L::add, L::normalise, L::largest, L::inside};
  }
};

template <class R>
const Loops<R>& loops() {
  static const Loops<R> best = ARMOR_BEST(Loops<R>, SampleLoops<R>);
  return best;
}

int dtype_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Float: return 2;
    case ScalarType::Double: return 3;
    default: STD_TORCH_CHECK(false, "armor::transport: expected a floating point dtype, got ", toString(dtype));
  }
}

// The relative rounding of an entry that a ball forgives; float64 has no wider type to compute its steps in.
double forgiven(ScalarType dtype) {
  constexpr double of[] = {0x1p-10, 0x1p-7, 0x1p-23, 0x1p-48};
  return of[dtype_index(dtype)];
}

// Runs body(float{}) or body(double{}): what tensors of this dtype are computed in.
template <class Body>
void as_real(ScalarType dtype, const Body& body) {
  dtype == ScalarType::Double ? body(double{}) : body(float{});
}

ScalarType real_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- layouts

// Are x's samples packed pixel by pixel, rather than channel by channel?
bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous() || x.dim() < 4 || x.dim() > 5) return false;
  int64_t packed = 1;
  const auto fits = [&](int64_t dim) {
    const bool fit = x.size(dim) == 1 || x.stride(dim) == packed;
    packed *= x.size(dim);
    return fit;
  };
  bool all = fits(1);
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) all = fits(dim) && all;
  return fits(0) && all;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.stride(i) != b.stride(i)) return false;
  return true;
}

// How the samples of x lie in memory, and the tensors of a call in that order.
struct Layout {
  int64_t samples, n, channels;
  bool channels_last;

  Layout(const Tensor& x, std::initializer_list<const Tensor*> others) {
    STD_TORCH_CHECK(x.dim() > 0, "armor::transport: x must have a batch dimension");
    samples = x.size(0), n = 1, channels = x.dim() > 1 ? x.size(1) : 1;
    for (int64_t i = 1; i < x.dim(); ++i) n *= x.size(i);
    channels_last = is_channels_last(x);
    for (const Tensor* t : others) {
      bool same = t->dim() == x.dim();
      for (int64_t i = 0; same && i < x.dim(); ++i) same = t->size(i) == x.size(i);
      STD_TORCH_CHECK(same, "armor::transport: x, x_adv and grad must have one shape");
      channels_last = channels_last && same_strides(x, *t);
    }
  }

  Tensor dense(const Tensor& t) const { return channels_last ? t : torch::stable::contiguous(t); }

  Tensor empty_like(const Tensor& t, ScalarType dtype) const {
    const MemoryFormat last = t.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    return torch::stable::empty(t.sizes(), dtype, std::nullopt, t.device(), std::nullopt,
                                channels_last ? last : MemoryFormat::Contiguous);
  }

  // Per-channel values as one per element, in memory order.
  template <class R>
  std::vector<R> spread(const Maybe& values) const {
    if (!values) return {};
    STD_TORCH_CHECK(values->numel() == channels && values->scalar_type() == CppTypeToScalarType<R>::value,
                    "armor::transport: mean or std has the wrong dtype, or not one entry per channel");
    const Tensor dense = torch::stable::contiguous(*values);
    const R* const value = static_cast<const R*>(dense.data_ptr());
    std::vector<R> all(n);
    for (int64_t i = 0; i < n; ++i) all[i] = value[channels_last ? i % channels : i / (n / channels)];
    return all;
  }

  // The values of a sample, from logical order to memory order.
  template <class R>
  const R* arranged(const R* logical, R* memory) const {
    if (!channels_last) return logical;
    const int64_t pixels = n / channels;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c) memory[p * channels + c] = logical[c * pixels + p];
    return memory;
  }
};

// A dense tensor, sample by sample, read and written as R: in place if that is its dtype.
template <class R>
class Batch {
 public:
  Batch(const Tensor& t, const Layout& layout)
      : data(static_cast<char*>(t.data_ptr())), n(layout.n), bytes(n * static_cast<int64_t>(t.element_size())),
        dtype(dtype_index(t.scalar_type())), in_place(dtype == (sizeof(R) == 4 ? 2 : 3)) {}

  const R* read(int64_t sample, R* scratch) const {
    if (in_place) return at(sample);
    loops<R>().load[dtype](data + sample * bytes, scratch, n);
    return scratch;
  }
  R* target(int64_t sample, R* scratch) const { return in_place ? at(sample) : scratch; }
  void write(int64_t sample, const R* from) const {
    if (from != at(sample)) loops<R>().store[dtype](from, data + sample * bytes, n);
  }

 private:
  char* data;
  int64_t n, bytes;
  int dtype;
  bool in_place;

  R* at(int64_t sample) const { return reinterpret_cast<R*>(data + sample * bytes); }
};

// A tensor [B], or 0-dim for all samples alike, that may not be given.
template <class V>
class PerSample {
 public:
  PerSample(const Maybe& t, const Layout& layout) {
    if (!t) return;
    STD_TORCH_CHECK(t->scalar_type() == CppTypeToScalarType<V>::value &&
                        (t->dim() == 0 || t->numel() == layout.samples),
                    "armor::transport: mu, radii, active or seeds has the wrong dtype or shape");
    held = torch::stable::contiguous(*t), stride = t->dim() ? 1 : 0;
    data = static_cast<const V*>(held->data_ptr());
  }
  explicit operator bool() const { return held.has_value(); }
  V operator[](int64_t sample) const { return data[sample * stride]; }

 private:
  Maybe held;
  const V* data = nullptr;
  int64_t stride = 0;
};

// The scratch arrays of a thread, one sample long each.
enum Slot { kXAdv, kX, kGrad, kXNext, kNoise, kFeed, kScratch, kSlots = kScratch + 2 };

template <class R>
class Scratch {
 public:
  explicit Scratch(int64_t n) : length((n + 3 + 15) / 16 * 16), data(new R[kSlots * length]) {}  // noise comes by fours
  R* operator[](Slot slot) const { return data.get() + slot * length; }

 private:
  int64_t length;
  std::unique_ptr<R[]> data;
};

// body(sample, scratch) for every sample, in parallel.
template <class R, class Body>
void for_samples(const Layout& layout, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / (layout.n + 1));
  torch::stable::parallel_for(0, layout.samples, grain, [&](int64_t begin, int64_t end) {
    const Scratch<R> scratch(layout.n);
    for (int64_t b = begin; b < end; ++b) body(b, scratch);
  });
}

Tensor per_sample(const Tensor& x, ScalarType dtype) { return torch::stable::new_empty(x, {x.size(0)}, dtype); }

// What the model is fed: (x_adv - mean) / std in feed_dtype. Empty unless one of them is given.
Tensor empty_feed(const Tensor& x, const Layout& layout, const Maybe& mean, const Maybe& std,
                  std::optional<ScalarType> feed_dtype) {
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "armor::transport: mean and std come together");
  if (!mean && !feed_dtype) return torch::stable::new_empty(x, {0});
  return layout.empty_like(x, feed_dtype.value_or(x.scalar_type()));
}

template <class R>
class Feed {
 public:
  const bool wanted;

  Feed(const Tensor& feed_, const Layout& layout, const Maybe& mean_, const Maybe& std_)
      : wanted(feed_.numel() > 0), feed(feed_, layout), n(layout.n), mean(layout.spread<R>(mean_)),
        std(layout.spread<R>(std_)) {}

  void write(int64_t sample, const R* x_adv, const Scratch<R>& scratch) const {
    if (mean.empty()) return feed.write(sample, x_adv);
    R* const out = feed.target(sample, scratch[kFeed]);
    loops<R>().normalise(x_adv, mean.data(), std.data(), n, out);
    feed.write(sample, out);
  }

 private:
  Batch<R> feed;
  int64_t n;
  std::vector<R> mean, std;
};

// What all samples of a call have in common.
template <class R>
Sample<R> rule_of(const Layout& layout, double radius, double weight, double power, int64_t norm, double lo,
                  double hi) {
  Sample<R> rule{};
  rule.n = layout.n, rule.lo = static_cast<R>(lo), rule.hi = static_cast<R>(hi), rule.radius = radius;
  rule.weight = weight, rule.power = power, rule.norm = static_cast<int>(norm);
  return rule;
}

// Where `binary` rounds up: above these.
template <class R>
const R* thresholds(const PerSample<int64_t>& seeds, int64_t sample, const Layout& layout, const Scratch<R>& scratch) {
  if (!seeds) {
    std::fill_n(scratch[kNoise], layout.n, R(0.5));
    return scratch[kNoise];
  }
  loops<R>().uniforms(static_cast<uint64_t>(seeds[sample]), Stream::rounding, layout.n,
                      reinterpret_cast<uint32_t*>(scratch[kScratch]), scratch[kNoise]);
  return layout.arranged(scratch[kNoise], scratch[kScratch]);
}

// ---- the operators

std::tuple<Tensor, Tensor, Tensor> init_op(const Tensor& x_in, const Maybe& seeds_in, const Maybe& radii_in,
                                           const Maybe& mean, const Maybe& std, int64_t start, double radius, double lo,
                                           double hi, std::optional<ScalarType> feed_dtype) {
  const bool noisy = static_cast<Start>(start) != Start::clean;
  STD_TORCH_CHECK(start >= 0 && start <= 4 && (seeds_in || !noisy), "armor::transport_init: bad start or no seeds");
  const Layout layout(x_in, {});
  const Tensor x = layout.dense(x_in), x_adv = layout.empty_like(x, x.scalar_type());
  const Tensor status = per_sample(x, ScalarType::Int), feed = empty_feed(x, layout, mean, std, feed_dtype);
  as_real(x.scalar_type(), [&](auto real) {
    using R = decltype(real);
    const Loops<R>& loop = loops<R>();
    const Batch<R> clean(x, layout), moved(x_adv, layout);
    const Feed<R> fed(feed, layout, mean, std);
    const PerSample<R> radii(radii_in, layout);
    const PerSample<int64_t> seeds(seeds_in, layout);
    const R low = static_cast<R>(lo), high = static_cast<R>(hi);
    int32_t* const states = static_cast<int32_t*>(status.data_ptr());
    for_samples<R>(layout, [&](int64_t b, const Scratch<R>& scratch) {
      const R* const from = clean.read(b, scratch[kX]);
      states[b] = loop.inside(from, layout.n, low, high) ? 0 : kOutside;
      if (noisy) {
        R* const out = moved.target(b, scratch[kXNext]);
        loop.noise[start](static_cast<uint64_t>(seeds[b]), radii ? radii[b] : radius, layout.n,
                          reinterpret_cast<uint32_t*>(scratch[kScratch]), scratch[kNoise]);
        loop.add(from, layout.arranged(scratch[kNoise], scratch[kScratch]), layout.n, low, high, out);
        moved.write(b, out);
      } else {
        moved.write(b, from);
      }
      if (fed.wanted) fed.write(b, moved.read(b, scratch[kXAdv]), scratch);
    });
  });
  return {x_adv, status, feed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step_op(
    const Tensor& x_adv_in, const Tensor& grad_in, const Tensor& x_in, const Maybe& mu_in, const Maybe& radii_in,
    const Maybe& active_in, const Maybe& seeds_in, const Maybe& mean, const Maybe& std, int64_t kind, double radius,
    double step_size, double weight, double power, int64_t norm, int64_t variant, double lo, double hi, bool targeted,
    bool final, std::optional<ScalarType> feed_dtype) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 5, "armor::transport_step: kind must be 0 to 5, got ", kind);
  STD_TORCH_CHECK(x_adv_in.scalar_type() == x_in.scalar_type(), "armor::transport_step: x_adv and x differ in dtype");
  const Layout layout(x_in, {&x_adv_in, &grad_in});
  const Tensor x = layout.dense(x_in), x_adv = layout.dense(x_adv_in), grad = layout.dense(grad_in);
  const auto ends_as = [&](Transport t) { return final && static_cast<Transport>(kind) == t; };
  const bool costly = ends_as(Transport::norm_power) || ends_as(Transport::soft_ball);
  const Tensor x_next = layout.empty_like(x, x.scalar_type()), status = per_sample(x, ScalarType::Int);
  const Tensor costs = costly ? per_sample(x, real_of(x)) : torch::stable::new_empty(x, {0}, real_of(x));
  const Tensor feed = empty_feed(x, layout, mean, std, feed_dtype);
  as_real(x.scalar_type(), [&](auto real) {
    using R = decltype(real);
    const Loops<R>& loop = loops<R>();
    const Batch<R> clean(x, layout), here(x_adv, layout), slope(grad, layout), next(x_next, layout);
    const Feed<R> fed(feed, layout, mean, std);
    const PerSample<R> mu(mu_in, layout), radii(radii_in, layout);
    const PerSample<bool> active(active_in, layout);
    const PerSample<int64_t> seeds(seeds_in, layout);
    Sample<R> rule = rule_of<R>(layout, radius, weight, power, norm, lo, hi);
    rule.mu = 1.0, rule.step_size = step_size, rule.variant = static_cast<int>(variant);
    int32_t* const states = static_cast<int32_t*>(status.data_ptr());
    R* const paid = static_cast<R*>(costs.data_ptr());
    // the gradient that a step follows is `grad` divided by this
    std::vector<R> divisor = std || !targeted ? layout.spread<R>(std) : std::vector<R>(layout.n, R(1));
    if (targeted) std::transform(divisor.begin(), divisor.end(), divisor.begin(), std::negate<R>());
    for_samples<R>(layout, [&](int64_t b, const Scratch<R>& scratch) {
      Sample<R> s = rule;
      s.x_adv = here.read(b, scratch[kXAdv]), s.x = clean.read(b, scratch[kX]), s.scratch = scratch[kScratch];
      s.x_next = next.target(b, scratch[kXNext]);
      if (radii) s.radius = radii[b];
      if (mu) s.mu = mu[b];
      states[b] = loop.inside(s.x, s.n, s.lo, s.hi) ? 0 : kOutside;
      bool moves = !active || active[b];
      if (moves) {
        s.grad = slope.read(b, scratch[kGrad]);
        if (!divisor.empty()) {
          loop.normalise(s.grad, nullptr, divisor.data(), s.n, scratch[kGrad]);
          s.grad = scratch[kGrad];
        }
        s.grad_max = loop.largest(s.grad, s.n);
        moves = std::isfinite(s.grad_max) && !std::isnan(s.mu);
        s.mu = std::fmin(s.mu, kMaxMu);
        if (!moves) states[b] |= kBadGradient;
      }
      if (moves) loop.step[kind](s);
      else std::copy_n(s.x_adv, s.n, s.x_next);
      if (ends_as(Transport::binary)) loop.round(s, thresholds(seeds, b, layout, scratch));
      next.write(b, s.x_next);
      if (!costly && !fed.wanted) return;
      s.x_adv = next.read(b, scratch[kXAdv]);  // as rounded to its dtype
      if (costly) paid[b] = static_cast<R>(loop.cost[kind](s));
      if (fed.wanted) fed.write(b, s.x_adv, scratch);
    });
  });
  return {x_next, status, costs, feed};
}

Tensor cost_op(const Tensor& x_adv_in, const Tensor& x_in, const Maybe& radii_in, int64_t kind, double radius,
               double weight, double power, int64_t norm, double lo, double hi) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 5, "armor::transport_cost: kind must be 0 to 5, got ", kind);
  STD_TORCH_CHECK(x_adv_in.scalar_type() == x_in.scalar_type(), "armor::transport_cost: x_adv and x differ in dtype");
  const Layout layout(x_in, {&x_adv_in});
  const Tensor x = layout.dense(x_in), x_adv = layout.dense(x_adv_in), costs = per_sample(x, real_of(x));
  const double n = static_cast<double>(layout.n), growth[] = {1.0, std::sqrt(n), n, 0.0, 0.0, 0.0};
  constexpr int64_t ball_norm[] = {0, 2, 1};
  as_real(x.scalar_type(), [&](auto real) {
    using R = decltype(real);
    const Batch<R> clean(x, layout), here(x_adv, layout);
    const PerSample<R> radii(radii_in, layout);
    Sample<R> rule = rule_of<R>(layout, radius, weight, power, kind < 3 ? ball_norm[kind] : norm, lo, hi);
    rule.slack = forgiven(x.scalar_type()) * growth[kind];
    for_samples<R>(layout, [&](int64_t b, const Scratch<R>& scratch) {
      Sample<R> s = rule;
      s.x_adv = here.read(b, scratch[kXAdv]), s.x = clean.read(b, scratch[kX]);
      if (radii) s.radius = radii[b];
      static_cast<R*>(costs.data_ptr())[b] = static_cast<R>(loops<R>().cost[kind](s));
    });
  });
  return costs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(armor, CPU, m) {
  m.impl("transport_init", TORCH_BOX(&init_op));
  m.impl("transport_step", TORCH_BOX(&step_op));
  m.impl("transport_cost", TORCH_BOX(&cost_op));
}

}  // namespace armor::cpu
