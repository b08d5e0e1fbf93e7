// Launches of the kernels in dual.cuh, and their registration for CUDA tensors.

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../tensors.h"
#include "dual.cuh"

namespace armor::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "armor::dual: ", what, ": ", cudaGetErrorString(error));
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
  const torch::stable::accelerator::DeviceGuard guard(losses.get_device_index());
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

template <class T>
void launch_backward(const Gradients<T>& g, const Tensor& losses) {
  const torch::stable::accelerator::DeviceGuard guard(losses.get_device_index());
  const int64_t most = static_cast<int64_t>(processors(losses)) * 32;
  const int64_t blocks = std::min(most, (g.rows * g.n + kBlock - 1) / kBlock);
  dual_backward<T><<<static_cast<unsigned>(blocks), kBlock, 0, current_stream(losses)>>>(g);
  check(cudaGetLastError(), "launch");
}

DualOutputs dual_op(const Tensor& losses, const std::optional<Tensor>& costs, const std::optional<Tensor>& clean,
                    int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  return armor::dual(losses, costs, clean, divergence, alpha, radius, kappa, max_dual,
                     [](const auto& rows, const Tensor& on) { launch(rows, on); });
}

DualGradients dual_backward_op(const Tensor& grad, const Tensor& mu, const Tensor& weights, const Tensor& losses,
                               const std::optional<Tensor>& costs, const std::optional<Tensor>& clean) {
  return armor::dual_backward(grad, mu, weights, losses, costs, clean,
                              [](const auto& gradients, const Tensor& on) { launch_backward(gradients, on); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(armor, CUDA, m) {
  m.impl("dual", TORCH_BOX(&dual_op));
  m.impl("dual_backward", TORCH_BOX(&dual_backward_op));
}

}  // namespace armor::cuda
