// Launches of the kernels in dual.cuh, and their registration for CUDA tensors.

#include "launch.h"

#include <algorithm>

#include "../tensors.h"
#include "dual.cuh"

namespace armor::cuda {
namespace {

// One launch: a warp a row, a block a row, or the whole grid row after row.
template <class T>
void solve(const Rows<T>& all, const Tensor& losses) {
  const DeviceGuard guard(losses.get_device_index());
  const cudaStream_t stream = current_stream(losses);
  if (all.n <= kWarpRow) {
    launch(dual<T, WarpGroup>, blocks_for(losses, all.rows, kWarps), kBlock, stream, all, Workspace{});
  } else if (all.n <= kBlockRow) {
    launch(dual<T, BlockGroup>, blocks_for(losses, all.rows, 1), kBlock, stream, all, Workspace{});
  } else {
    const int64_t resident = resident_blocks(losses, dual<T, GridGroup>, kBlock);
    const int64_t blocks = std::min(resident, (all.n + 4 * kBlock - 1) / (4 * kBlock));
    const Tensor partials = torch::stable::new_empty(losses, {2 * blocks * kWidest}, ScalarType::Double);
    launch_cooperatively(dual<T, GridGroup>, blocks, kBlock, stream, all, Workspace{pointer<double>(partials)});
  }
}

template <class T>
void differentiate(const Gradients<T>& g, const Tensor& losses) {
  const DeviceGuard guard(losses.get_device_index());
  launch(dual_backward<T>, blocks_for(losses, g.rows * g.n, kBlock), kBlock, current_stream(losses), g);
}

DualOutputs dual_op(const Tensor& losses, const std::optional<Tensor>& costs, const std::optional<Tensor>& clean,
                    int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  return armor::dual(losses, costs, clean, divergence, alpha, radius, kappa, max_dual,
                     [](const auto& rows, const Tensor& on) { solve(rows, on); });
}

DualGradients dual_backward_op(const Tensor& grad, const Tensor& mu, const Tensor& weights, const Tensor& losses,
                               const std::optional<Tensor>& costs, const std::optional<Tensor>& clean) {
  return armor::dual_backward(grad, mu, weights, losses, costs, clean,
                              [](const auto& gradients, const Tensor& on) { differentiate(gradients, on); });
}

}  // namespace

ARMOR_OPERATORS(m) {
  m.impl("dual", TORCH_BOX(&dual_op));
  m.impl("dual_backward", TORCH_BOX(&dual_backward_op));
}

}  // namespace armor::cuda
