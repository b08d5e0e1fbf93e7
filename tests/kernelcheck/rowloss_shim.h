// How the shims of csrc/cuda/rowloss.cuh launch its kernels.
#pragma once

#include "shim.h"

#include "rowloss.cuh"

namespace shim {

using namespace armor;
using namespace armor::cuda;

enum class Groups : int { warp, block, grid };

struct How {
  unsigned blocks;
  cuemu::Schedule schedule;

  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, const Arguments&... arguments) const {
    cuemu::launch(schedule, blocks, kBlock, [&] { kernel(arguments...); });
  }
};

template <class L, class T>
void solve(const How& how, Groups groups, const Rowlosses<L, T>& all, const Rows<T>& solved) {
  std::vector<double> partials(size_t{2} * how.blocks * kWidest, NAN);
  const Workspace workspace{partials.data()};
  if (groups == Groups::warp) how.launch(rowloss_dual<L, T, WarpGroup>, all, solved, workspace);
  if (groups == Groups::block) how.launch(rowloss_dual<L, T, BlockGroup>, all, solved, workspace);
  if (groups == Groups::grid) how.launch(rowloss_dual<L, T, GridGroup>, all, solved, workspace);
}

inline Settings dual_settings(int divergence, double alpha, double radius, bool wide, bool costs) {
  return {Family(static_cast<Kind>(divergence), alpha), radius, 0.0, 1e6, wide ? 1e-12 : 1e-6, costs, false};
}

}  // namespace shim
