// What the CPU and CUDA registrations of `dual` share: checks, outputs and dtypes, on PyTorch's stable ABI. A device
// adds a function that solves Rows<T> and one that computes Gradients<T>.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "armor/row.h"

namespace armor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using DualOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using DualGradients = std::tuple<Tensor, Tensor, Tensor>;

// `t`, contiguous, once it is known to match `like`.
inline Tensor matching(const Tensor& t, const Tensor& like, const char* name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "armor::dual: ", name, " has another shape than losses");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "armor::dual: ", name, " has another dtype than losses");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), "armor::dual: ", name,
                  " is on another device than losses");
  return torch::stable::contiguous(t);
}

inline std::optional<Tensor> matching(const std::optional<Tensor>& t, const Tensor& like, const char* name) {
  return t ? std::optional<Tensor>(matching(*t, like, name)) : std::nullopt;
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

inline bool is_double(const Tensor& t) {
  const bool single = t.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || t.scalar_type() == ScalarType::Double, "armor::dual: losses must be float32 or float64");
  return !single;
}

// Solves every row of `losses` [..., n] with solve(Rows<T>, losses).
template <class Solve>
DualOutputs dual(const Tensor& losses_in, const std::optional<Tensor>& costs_in, const std::optional<Tensor>& clean_in,
                 int64_t divergence, double alpha, double radius, double kappa, double max_dual, const Solve& solve) {
  STD_TORCH_CHECK(losses_in.dim() > 0 && losses_in.size(losses_in.dim() - 1) > 0,
                  "armor::dual: losses must hold at least one sample along the last dimension");
  STD_TORCH_CHECK(divergence >= 0 && divergence <= 2, "armor::dual: divergence must be 0, 1 or 2, got ", divergence);
  const Tensor losses = torch::stable::contiguous(losses_in);
  const std::optional<Tensor> costs = matching(costs_in, losses, "costs");
  const std::optional<Tensor> clean = matching(clean_in, losses, "clean_losses");
  const bool wide = is_double(losses);

  const int64_t n = losses.size(losses.dim() - 1), rows = losses.numel() / n;
  std::vector<int64_t> shape(losses.dim() - 1);
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = losses.size(i);
  const auto per_row = [&](ScalarType dtype) { return torch::stable::new_empty(losses, shape, dtype); };
  const ScalarType dtype = losses.scalar_type();
  DualOutputs out{per_row(dtype), per_row(dtype), per_row(dtype), torch::stable::empty_like(losses),
                  per_row(ScalarType::Int), per_row(ScalarType::Int)};
  if (rows == 0) return out;

  const Settings settings{Family(static_cast<Kind>(divergence), alpha), radius, kappa, max_dual, wide ? 1e-12 : 1e-6,
                          costs.has_value(), clean.has_value()};
  const auto call = [&](auto real) {
    using T = decltype(real);
    auto& [value, lam, nu, weights, status, passes] = out;
    solve(Rows<T>{pointer<T>(losses), pointer<T>(costs), pointer<T>(clean), pointer<T>(value), pointer<T>(lam),
                  pointer<T>(nu), pointer<T>(weights), pointer<int>(status), pointer<int>(passes), rows, n, settings},
          losses);
  };
  wide ? call(double{}) : call(float{});
  return out;
}

// The gradients of `dual` by differentiate(Gradients<T>, losses).
template <class Differentiate>
DualGradients dual_backward(const Tensor& grad_in, const Tensor& mu_in, const Tensor& weights_in,
                            const Tensor& losses_in, const std::optional<Tensor>& costs_in,
                            const std::optional<Tensor>& clean_in, const Differentiate& differentiate) {
  const Tensor losses = torch::stable::contiguous(losses_in), weights = matching(weights_in, losses, "weights");
  const Tensor grad = torch::stable::contiguous(grad_in), mu = torch::stable::contiguous(mu_in);
  const std::optional<Tensor> costs = matching(costs_in, losses, "costs");
  const std::optional<Tensor> clean = matching(clean_in, losses, "clean_losses");
  const auto like = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(weights) : torch::stable::new_empty(weights, {0});
  };
  DualGradients out{like(true), like(costs.has_value()), like(clean.has_value())};
  if (losses.numel() == 0) return out;
  const auto call = [&](auto real) {
    using T = decltype(real);
    auto& [to_losses, to_costs, to_clean] = out;
    const int64_t n = losses.size(losses.dim() - 1);
    differentiate(Gradients<T>{pointer<T>(grad), pointer<T>(mu), pointer<T>(weights), pointer<T>(losses),
                               pointer<T>(costs), pointer<T>(clean), pointer<T>(to_losses), pointer<T>(to_costs),
                               pointer<T>(to_clean), losses.numel() / n, n},
                  losses);
  };
  is_double(losses) ? call(double{}) : call(float{});
  return out;
}

}  // namespace armor
