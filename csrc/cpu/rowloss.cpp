// armor::rowloss on the CPU: rows in parallel, each by the loops of rowloss_row.h, and the dual of their losses by the
// solver of dual.cpp (docs/math.md, section 4).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../rowloss_tensors.h"
#include "dual_rows.h"

namespace armor::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kGrain = 8192;  // classes that are worth a thread

#define ARMOR_LOOPS "rowloss_row.h"
#include "levels.h"

template <class L>
struct Loops {
  using T = RealOf<L>;
  void (*losses)(const Rowlosses<L, T>&, int64_t, int64_t);
  void (*gradients)(const RowlossGradients<L, T>&, int64_t, int64_t);

  template <class Level>
  static Loops of() {
    return {Level::losses, Level::gradients};
  }
};

template <class L>
const Loops<L>& loops() {
  static const Loops<L> best = ARMOR_BEST(Loops<L>, RowlossLoops<L>);
  return best;
}

// body(begin, end) for all rows, shared out among threads. A row's result does not depend on the shares.
template <class Body>
void for_rows(int64_t rows, int64_t classes, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / classes);
  if (rows <= grain) body(0, rows);
  else torch::stable::parallel_for(0, rows, grain, body);
}

template <class L, class T>
void find_losses(const Rowlosses<L, T>& all) {
  const Loops<L>& loop = loops<L>();
  for_rows(all.rows, all.classes, [&](int64_t begin, int64_t end) { loop.losses(all, begin, end); });
}

RowlossOutputs rowloss_op(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& natural,
                          int64_t kind, double beta, double smoothing, int64_t ignore_index) {
  return rowloss({logits, target, natural, kind, beta, smoothing, ignore_index},
                 [](const auto& all, const Tensor&) { find_losses(all); });
}

RowlossOutputs rowloss_backward_op(const Tensor& grad, const std::optional<Tensor>& weights, const Tensor& logits,
                                   const Tensor& target, const std::optional<Tensor>& natural, const Tensor& stats,
                                   int64_t kind, double beta, double smoothing, int64_t ignore_index,
                                   bool natural_grad) {
  return rowloss_backward({logits, target, natural, kind, beta, smoothing, ignore_index}, grad, weights, stats,
                          natural_grad, [](const auto& all, const Tensor&) {
                            const auto& loop = loops<std::remove_pointer_t<decltype(all.to_logits)>>();
                            for_rows(all.rows, all.classes,
                                     [&](int64_t begin, int64_t end) { loop.gradients(all, begin, end); });
                          });
}

RowlossDualOutputs rowloss_dual_op(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& natural,
                                   const std::optional<Tensor>& costs, int64_t kind, double beta, double smoothing,
                                   int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  return rowloss_dual({logits, target, natural, kind, beta, smoothing, kIgnoreNothing}, costs, divergence, alpha,
                      radius, kappa, max_dual, [](const auto& all, const auto& rows, const Tensor&) {
                        find_losses(all);
                        solve_rows(rows);
                      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(armor, CPU, m) {
  m.impl("rowloss", TORCH_BOX(&rowloss_op));
  m.impl("rowloss_backward", TORCH_BOX(&rowloss_backward_op));
  m.impl("rowloss_dual", TORCH_BOX(&rowloss_dual_op));
}

}  // namespace armor::cpu
