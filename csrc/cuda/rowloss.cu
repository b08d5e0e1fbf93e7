// Launches of the kernels in rowloss.cuh, and their registration for CUDA tensors.

#include "launch.h"

#include <algorithm>
#include <type_traits>

#include "../rowloss_tensors.h"
#include "rowloss.cuh"

namespace armor::cuda {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The kernels' own name for a type of logits, which is laid out alike.
template <class L>
using OnDevice = std::conditional_t<std::is_same_v<L, Half>, __half,
                                    std::conditional_t<std::is_same_v<L, BFloat16>, __nv_bfloat16, L>>;

template <class L, class T>
Rowlosses<OnDevice<L>, T> on_device(const Rowlosses<L, T>& all) {
  using D = OnDevice<L>;
  return {reinterpret_cast<const D*>(all.logits), reinterpret_cast<const D*>(all.natural), all.target, all.losses,
          all.stats, all.rows, all.classes, all.settings};
}

template <class L, class T>
RowlossGradients<OnDevice<L>, T> on_device(const RowlossGradients<L, T>& all) {
  using D = OnDevice<L>;
  return {all.grad, all.weights, reinterpret_cast<const D*>(all.logits), reinterpret_cast<const D*>(all.natural),
          all.target, all.stats, reinterpret_cast<D*>(all.to_logits), reinterpret_cast<D*>(all.to_natural),
          all.rows, all.classes, all.samples, all.settings};
}

// A warp a row, or a block a row.
template <class All>
int64_t blocks_of(const All& all, const Tensor& logits) {
  return blocks_for(logits, all.rows, all.classes <= kWarpClasses ? kWarps : 1);
}

template <class L, class T>
void run(const Rowlosses<L, T>& all, const Tensor& logits) {
  const DeviceGuard guard(logits.get_device_index());
  launch(rowloss<L, T>, blocks_of(all, logits), kBlock, current_stream(logits), all);
}

template <class L, class T>
void differentiate(const RowlossGradients<L, T>& all, const Tensor& logits) {
  const DeviceGuard guard(logits.get_device_index());
  launch(rowloss_backward<L, T>, blocks_of(all, logits), kBlock, current_stream(logits), all);
}

// As many blocks as find the losses fastest and are resident together; the dual gets along with any number.
template <class Group, class L, class T>
void solve_by(const Rowlosses<L, T>& all, const Rows<T>& solved, const Tensor& logits) {
  const auto kernel = rowloss_dual<L, T, Group>;
  const int64_t blocks = std::min(resident_blocks(logits, kernel, kBlock), blocks_of(all, logits));
  const int64_t partials = std::is_same_v<Group, GridGroup> ? 2 * blocks * kWidest : 0;
  const Tensor workspace = torch::stable::new_empty(logits, {partials}, ScalarType::Double);
  launch_cooperatively(kernel, blocks, kBlock, current_stream(logits), all, solved,
                       Workspace{pointer<double>(workspace)});
}

template <class L, class T>
void solve(const Rowlosses<L, T>& all, const Rows<T>& solved, const Tensor& logits) {
  const DeviceGuard guard(logits.get_device_index());
  if (solved.n <= kWarpRow) solve_by<WarpGroup>(all, solved, logits);
  else if (solved.n <= kBlockRow) solve_by<BlockGroup>(all, solved, logits);
  else solve_by<GridGroup>(all, solved, logits);
}

RowlossOutputs rowloss_op(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& natural,
                          int64_t kind, double beta, double smoothing, int64_t ignore_index) {
  return armor::rowloss({logits, target, natural, kind, beta, smoothing, ignore_index},
                        [](const auto& all, const Tensor& on) { run(on_device(all), on); });
}

RowlossOutputs rowloss_backward_op(const Tensor& grad, const std::optional<Tensor>& weights, const Tensor& logits,
                                   const Tensor& target, const std::optional<Tensor>& natural, const Tensor& stats,
                                   int64_t kind, double beta, double smoothing, int64_t ignore_index,
                                   bool natural_grad) {
  return armor::rowloss_backward(
      {logits, target, natural, kind, beta, smoothing, ignore_index}, grad, weights, stats, natural_grad,
      [](const auto& all, const Tensor& on) { differentiate(on_device(all), on); });
}

RowlossDualOutputs rowloss_dual_op(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& natural,
                                   const std::optional<Tensor>& costs, int64_t kind, double beta, double smoothing,
                                   int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  return armor::rowloss_dual(
      {logits, target, natural, kind, beta, smoothing, kIgnoreNothing}, costs, divergence, alpha, radius, kappa,
      max_dual, [](const auto& all, const auto& solved, const Tensor& on) { solve(on_device(all), solved, on); });
}

}  // namespace

ARMOR_OPERATORS(m) {
  m.impl("rowloss", TORCH_BOX(&rowloss_op));
  m.impl("rowloss_backward", TORCH_BOX(&rowloss_backward_op));
  m.impl("rowloss_dual", TORCH_BOX(&rowloss_dual_op));
}

}  // namespace armor::cuda
