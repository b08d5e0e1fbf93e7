// Launches of the kernels in dual.cuh, and their registration for CUDA tensors.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "armor/row.h"
#include "dual.cuh"

namespace armor::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "armor::dual: ", what, ": ", cudaGetErrorString(error));
}

// `t`, contiguous, once it is known to match `like`.
Tensor samples(const Tensor& t, const Tensor& like, const char* name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "armor::dual: ", name, " has another shape than losses");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "armor::dual: ", name, " has another dtype than losses");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), "armor::dual: ", name,
                  " is on another device than losses");
  return torch::stable::contiguous(t);
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int processors(const Tensor& t) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()), "device query");
  return count;
}

// One launch: a warp a row, a block a row, or the whole grid row after row.
template <class T>
void launch(const Rows<T>& all, const Tensor& losses) {
  const cudaStream_t stream = current_stream(losses);
  const int64_t most = static_cast<int64_t>(processors(losses)) * 32;
  if (all.n <= kWarpRow) {
    const int64_t blocks = std::min(most, (all.rows + kWarps - 1) / kWarps);
    dual<T, WarpGroup><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(all, Workspace{});
  } else if (all.n <= kBlockRow) {
    dual<T, BlockGroup><<<static_cast<unsigned>(std::min(most, all.rows)), kBlock, 0, stream>>>(all, Workspace{});
  } else {
    int per_processor = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, dual<T, GridGroup>, kBlock, 0), "occupancy");
    const int64_t resident = static_cast<int64_t>(per_processor) * processors(losses);
    const int64_t blocks = std::min(resident, (all.n + 4 * kBlock - 1) / (4 * kBlock));
    const Tensor partials = torch::stable::new_empty(losses, {2 * blocks * kWidest}, ScalarType::Double);
    Rows<T> rows = all;
    Workspace workspace{pointer<double>(partials)};
    void* arguments[] = {&rows, &workspace};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(dual<T, GridGroup>), dim3(static_cast<unsigned>(blocks)),
                                      dim3(kBlock), arguments, 0, stream),
          "launch");
  }
  check(cudaGetLastError(), "launch");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Outputs run(const Tensor& losses_in, const std::optional<Tensor>& costs_in, const std::optional<Tensor>& clean_in,
            Settings settings) {
  const torch::stable::accelerator::DeviceGuard guard(losses_in.get_device_index());
  const Tensor losses = torch::stable::contiguous(losses_in);
  std::optional<Tensor> costs, clean;
  if (costs_in) costs = samples(*costs_in, losses, "costs");
  if (clean_in) clean = samples(*clean_in, losses, "clean_losses");

  const int64_t n = losses.size(losses.dim() - 1), rows = losses.numel() / n;
  std::vector<int64_t> shape(losses.dim() - 1);
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = losses.size(i);
  const auto per_row = [&](ScalarType dtype) { return torch::stable::new_empty(losses, shape, dtype); };
  const ScalarType dtype = losses.scalar_type();
  Outputs out{per_row(dtype), per_row(dtype), per_row(dtype), torch::stable::empty_like(losses),
              per_row(ScalarType::Int), per_row(ScalarType::Int)};
  auto& [value, lam, nu, weights, status, passes] = out;
  if (rows == 0) return out;
  settings.tolerance = sizeof(T) == 4 ? 1e-6 : 1e-12;
  launch(Rows<T>{pointer<T>(losses), pointer<T>(costs), pointer<T>(clean), pointer<T>(value), pointer<T>(lam),
                 pointer<T>(nu), pointer<T>(weights), pointer<int>(status), pointer<int>(passes), rows, n, settings},
         losses);
  return out;
}

Outputs dual_op(const Tensor& losses, const std::optional<Tensor>& costs, const std::optional<Tensor>& clean,
                int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  STD_TORCH_CHECK(losses.dim() > 0 && losses.size(losses.dim() - 1) > 0,
                  "armor::dual: losses must hold at least one sample along the last dimension");
  STD_TORCH_CHECK(divergence >= 0 && divergence <= 2, "armor::dual: divergence must be 0, 1 or 2, got ", divergence);
  const Settings settings{Family(static_cast<Kind>(divergence), alpha), radius, kappa, max_dual, 0.0,
                          costs.has_value(), clean.has_value()};
  if (losses.scalar_type() == ScalarType::Float) return run<float>(losses, costs, clean, settings);
  STD_TORCH_CHECK(losses.scalar_type() == ScalarType::Double, "armor::dual: losses must be float32 or float64");
  return run<double>(losses, costs, clean, settings);
}

using Grads = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Grads run_backward(const Tensor& grad_in, const Tensor& mu_in, const Tensor& weights_in, const Tensor& losses_in,
                   const std::optional<Tensor>& costs_in, const std::optional<Tensor>& clean_in) {
  const torch::stable::accelerator::DeviceGuard guard(losses_in.get_device_index());
  const Tensor losses = torch::stable::contiguous(losses_in), weights = samples(weights_in, losses, "weights");
  const Tensor grad = torch::stable::contiguous(grad_in), mu = torch::stable::contiguous(mu_in);
  std::optional<Tensor> costs, clean;
  if (costs_in) costs = samples(*costs_in, losses, "costs");
  if (clean_in) clean = samples(*clean_in, losses, "clean_losses");
  const auto like = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(weights) : torch::stable::new_empty(weights, {0});
  };
  Grads out{like(true), like(costs.has_value()), like(clean.has_value())};
  const int64_t total = losses.numel(), n = losses.size(losses.dim() - 1);
  if (total == 0) return out;
  const int64_t blocks = std::min<int64_t>(static_cast<int64_t>(processors(losses)) * 32, (total + kBlock - 1) / kBlock);
  dual_backward<T><<<static_cast<unsigned>(blocks), kBlock, 0, current_stream(losses)>>>(Gradients<T>{
      pointer<T>(grad), pointer<T>(mu), pointer<T>(weights), pointer<T>(losses), pointer<T>(costs), pointer<T>(clean),
      pointer<T>(std::get<0>(out)), pointer<T>(std::get<1>(out)), pointer<T>(std::get<2>(out)), total / n, n});
  check(cudaGetLastError(), "launch");
  return out;
}

Grads dual_backward_op(const Tensor& grad, const Tensor& mu, const Tensor& weights, const Tensor& losses,
                       const std::optional<Tensor>& costs, const std::optional<Tensor>& clean) {
  if (losses.scalar_type() == ScalarType::Float) return run_backward<float>(grad, mu, weights, losses, costs, clean);
  STD_TORCH_CHECK(losses.scalar_type() == ScalarType::Double, "armor::dual_backward: losses must be float32 or float64");
  return run_backward<double>(grad, mu, weights, losses, costs, clean);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(armor, CUDA, m) {
  m.impl("dual", TORCH_BOX(&dual_op));
  m.impl("dual_backward", TORCH_BOX(&dual_backward_op));
}

}  // namespace armor::cuda
