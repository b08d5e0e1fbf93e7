// What the CPU and CUDA registrations of `rowloss` share: checks, outputs and dtypes, on PyTorch's stable ABI. A device
// adds functions that take Rowlosses<L, T>, RowlossGradients<L, T>, and Rowlosses<L, T> together with Rows<T>; L is the
// type of the logits and T that of the losses.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "armor/rowloss.h"
#include "tensors.h"

namespace armor {

using RowlossOutputs = std::tuple<Tensor, Tensor>;
using RowlossDualOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class L>
using RealOf = std::conditional_t<std::is_same_v<L, double>, double, float>;

// run(L{}) with the C++ type of `dtype`.
template <class Run>
void with_logits_type(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Half: return run(torch::headeronly::Half{});
    case ScalarType::BFloat16: return run(torch::headeronly::BFloat16{});
    case ScalarType::Float: return run(float{});
    case ScalarType::Double: return run(double{});
    default: STD_TORCH_CHECK(false, "armor::rowloss: logits must be float16, bfloat16, float32 or float64");
  }
}

// The inputs of a call, contiguous, once they are known to fit each other.
struct __attribute__((visibility("hidden"))) RowlossInputs {
  Tensor logits, target;
  std::optional<Tensor> natural;
  LossSettings settings;
  std::vector<int64_t> shape;  // of the losses
  int64_t rows = 1, classes;

  RowlossInputs(const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& natural_in, int64_t kind,
                double beta, double smoothing, int64_t ignore_index)
      : logits(dense(logits_in)), target(dense(target_in)),
        settings{static_cast<Loss>(kind), beta, smoothing, ignore_index} {
    STD_TORCH_CHECK(kind >= 0 && kind <= 3, "armor::rowloss: kind must be 0, 1, 2 or 3, got ", kind);
    STD_TORCH_CHECK(logits.dim() > 0, "armor::rowloss: logits must have the classes as their last dimension");
    const int64_t last = logits.dim() - 1;
    classes = logits.size(last);
    STD_TORCH_CHECK(classes >= (settings.kind == Loss::mart ? 2 : 1) && classes <= INT32_MAX,
                    "armor::rowloss: this kind cannot have ", classes, " classes");
    bool fits = target.dim() == last;
    for (int64_t i = 0; fits && i < last; ++i) {
      shape.push_back(logits.size(i));
      rows *= shape.back();
      fits = target.size(i) == shape.back();
    }
    STD_TORCH_CHECK(fits, "armor::rowloss: target must have the shape of logits without the classes");
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "armor::rowloss: target must be int64");
    STD_TORCH_CHECK(target.get_device_index() == logits.get_device_index(),
                    "armor::rowloss: target is on another device than logits");
    if (!settings.has_natural()) return;
    STD_TORCH_CHECK(natural_in.has_value(), "armor::rowloss: this kind needs natural logits");
    natural = same_as_logits(*natural_in);
  }

  ScalarType real() const {
    return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  Tensor per_row(int64_t width = 0) const {
    std::vector<int64_t> sizes = shape;
    if (width) sizes.push_back(width);
    return torch::stable::new_empty(logits, sizes, real());
  }

  // What the backward pass is given: `t`, contiguous, once it is known to have so many entries of the losses' dtype.
  Tensor known(const Tensor& t, int64_t entries, const char* name) const {
    STD_TORCH_CHECK(t.numel() == entries, "armor::rowloss_backward: ", name, " has another shape than expected");
    STD_TORCH_CHECK(t.scalar_type() == real(), "armor::rowloss_backward: ", name, " has another dtype than the losses");
    STD_TORCH_CHECK(t.get_device_index() == logits.get_device_index(), "armor::rowloss_backward: ", name,
                    " is on another device than logits");
    return dense(t);
  }

  template <class L>
  Rowlosses<L, RealOf<L>> with(const Tensor& losses, const Tensor& stats) const {
    using T = RealOf<L>;
    return {pointer<L>(logits), pointer<L>(natural), pointer<int64_t>(target), pointer<T>(losses), pointer<T>(stats),
            rows,               classes,             settings};
  }

  // Saves a call into the dispatcher where there is nothing to do.
  static Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

 private:
  Tensor same_as_logits(const Tensor& t) const {
    bool same = t.dim() == logits.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == logits.size(i);
    STD_TORCH_CHECK(same, "armor::rowloss: natural has another shape than logits");
    STD_TORCH_CHECK(t.scalar_type() == logits.scalar_type(), "armor::rowloss: natural has another dtype than logits");
    STD_TORCH_CHECK(t.get_device_index() == logits.get_device_index(),
                    "armor::rowloss: natural is on another device than logits");
    return dense(t);
  }
};

// The losses by run(Rowlosses<L, T>, logits).
template <class Run>
RowlossOutputs rowloss(const RowlossInputs& in, const Run& run) {
  const Tensor losses = in.per_row(), stats = in.per_row(in.settings.stats_width());
  with_logits_type(in.logits.scalar_type(), [&](auto logit) {
    if (in.rows > 0) run(in.with<decltype(logit)>(losses, stats), in.logits);
  });
  return {losses, stats};
}

// The gradients by differentiate(RowlossGradients<L, T>, logits).
template <class Differentiate>
RowlossOutputs rowloss_backward(const RowlossInputs& in, const Tensor& grad_in, const std::optional<Tensor>& weights_in,
                                const Tensor& stats_in, bool natural_grad, const Differentiate& differentiate) {
  const auto like_logits = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(in.logits) : torch::stable::new_empty(in.logits, {0});
  };
  const bool has_second = natural_grad && in.settings.has_natural();
  const Tensor to_logits = like_logits(true), to_natural = like_logits(has_second);
  if (in.rows == 0) return {to_logits, to_natural};
  STD_TORCH_CHECK(!weights_in || !in.shape.empty(), "armor::rowloss_backward: weights need samples, logits have none");
  const int64_t samples = weights_in ? in.shape.back() : 1;
  const Tensor grad = in.known(grad_in, in.rows / samples, "grad");
  const Tensor stats = in.known(stats_in, in.rows * in.settings.stats_width(), "stats");
  std::optional<Tensor> weights;
  if (weights_in) weights = in.known(*weights_in, in.rows, "weights");
  with_logits_type(in.logits.scalar_type(), [&](auto logit) {
    using L = decltype(logit);
    using T = RealOf<L>;
    differentiate(RowlossGradients<L, T>{pointer<T>(grad), pointer<T>(weights), pointer<L>(in.logits),
                                         pointer<L>(in.natural), pointer<int64_t>(in.target), pointer<T>(stats),
                                         pointer<L>(to_logits), has_second ? pointer<L>(to_natural) : nullptr, in.rows,
                                         in.classes, samples, in.settings},
                  in.logits);
  });
  return {to_logits, to_natural};
}

// The losses and the dual over the last dimension of theirs by solve(Rowlosses<L, T>, Rows<T>, logits).
template <class Solve>
RowlossDualOutputs rowloss_dual(const RowlossInputs& in, const std::optional<Tensor>& costs, int64_t divergence,
                                double alpha, double radius, double kappa, double max_dual, const Solve& solve) {
  const Tensor losses = in.per_row(), stats = in.per_row(in.settings.stats_width());
  const auto solve_losses = [&](const auto& rows, const Tensor&) {
    with_logits_type(in.logits.scalar_type(), [&](auto logit) {
      using L = decltype(logit);
      if constexpr (std::is_same_v<std::decay_t<decltype(rows)>, Rows<RealOf<L>>>)
        solve(in.with<L>(losses, stats), rows, in.logits);
    });
  };
  auto [value, lam, nu, weights, status, passes] =
      dual(losses, costs, std::nullopt, divergence, alpha, radius, kappa, max_dual, solve_losses);
  return {value, losses, stats, lam, nu, weights, status, passes};
}

}  // namespace armor
