// armor::rowloss on CUDA (docs/math.md, section 4): a warp works on a row of few classes, a block on one of many, and
// armor/rowloss.h says what they add up over the classes. rowloss_dual goes on to the dual of the losses (dual.cuh)
// behind a barrier of the whole grid, in the same launch.
#pragma once

#include <type_traits>

#include "armor/rowloss.h"
#include "dual.cuh"

namespace armor::cuda {

constexpr int64_t kWarpClasses = 1024;  // rows of up to so many classes take a warp, longer ones a block

// ---- the classes of a row ------------------------------------------------------------------------------------------

__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class L>
__device__ inline L narrow(double x) {
  if constexpr (std::is_same_v<L, __half>) return __float2half_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<L, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(x));
  else return static_cast<L>(x);
}

// Neighbours that are loaded or stored at once.
template <class L, int count>
struct alignas(count * sizeof(L)) Pack {
  static constexpr int size = count;
  L values[count];
};

template <class L>
constexpr int kFullPack = 16 / sizeof(L);

template <int count, class L>
__device__ inline Pack<L, count> load(const L* from) {
  return *reinterpret_cast<const Pack<L, count>*>(from);
}

template <int count, class L>
__device__ inline void store(L* to, const Pack<L, count>& pack) {
  *reinterpret_cast<Pack<L, count>*>(to) = pack;
}

// The classes of one row. z are the adversarial logits, w the natural ones or null.
template <class L>
struct Classes {
  const L *z, *w;
  int64_t count;
  bool full_packs;  // does every row start and end at a multiple of 16 bytes?

  template <class All>
  __device__ Classes(const All& all, int64_t r)
      : z(all.logits + r * all.classes),
        w(all.natural ? all.natural + r * all.classes : nullptr),
        count(all.classes),
        full_packs(count % kFullPack<L> == 0 && aligned(all.logits) && aligned(all.natural)) {}

  __device__ static bool aligned(const L* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; }

  // Calls body(z of the pack, w of the pack, k) for the packs of classes k, k + 1, ... that are this thread's.
  template <class Group, class Body>
  __device__ void each(const Group& group, const Body& body) const {
    full_packs ? each_pack<kFullPack<L>>(group, body) : each_pack<1>(group, body);
  }

  // The logits by which the target and MART's rival enter the row's loss and gradient.
  __device__ Marked marked(const LossSettings& s, const RowStats& stats, int64_t target) const {
    return {wide(z[target]), w ? wide(w[target]) : 0.0,
            s.kind == Loss::mart ? wide(z[static_cast<int64_t>(stats.rival)]) : 0.0};
  }

 private:
  template <int size, class Group, class Body>
  __device__ void each_pack(const Group& group, const Body& body) const {
    for (int64_t k = group.rank() * size; k < count; k += group.size() * size)
      body(load<size>(z + k), w ? load<size>(w + k) : Pack<L, size>{}, k);
  }
};

// What look(part, k, z_k, w_k) adds to a part over all classes, for every thread of the group.
template <class Part, class L, class Group, class Look>
__device__ inline Part over_classes(const Classes<L>& row, const Group& group, const Look& look) {
  static_assert(sizeof(Part) <= kWidest * sizeof(double), "the scratch is laid out for the widest partial result");
  Part mine;
  row.each(group, [&](const auto& z, const auto& w, int64_t k) {
#pragma unroll
    for (int i = 0; i < z.size; ++i) look(mine, k + i, wide(z.values[i]), wide(w.values[i]));
  });
  return group.all(mine);
}

// Calls body(r, group) for every row, with a group of threads that suits the number of classes.
template <class Body>
__device__ inline void each_row(int64_t rows, int64_t classes, const Body& body) {
  SHARED_ARRAY(double, scratch, kWarps* kWidest);
  const auto loop = [&](const auto& group) {
    for (int64_t r = group.first_row(); r < rows; r += group.row_step()) body(r, group);
  };
  if (classes <= kWarpClasses) loop(WarpGroup(scratch, Workspace{}));
  else loop(BlockGroup(scratch, Workspace{}));
}

// ---- losses --------------------------------------------------------------------------------------------------------

template <class L, class T, class Group>
__device__ inline void find_loss(const Rowlosses<L, T>& all, int64_t r, const Group& group) {
  const LossSettings& s = all.settings;
  const Classes<L> row(all, r);
  const int64_t target = all.target[r];

  const Peaks peaks = over_classes<Peaks>(row, group, [&](Peaks& mine, int64_t k, T z, T w) {
    mine.look(static_cast<double>(k), k == target, z, w);
  });
  const T max_z = static_cast<T>(peaks.z), max_w = static_cast<T>(peaks.w);
  const Totals totals = over_classes<Totals>(
      row, group, [&](Totals& mine, int64_t, T z, T w) { mine.look(s, z - max_z, w - max_w); });
  RowStats stats(s, peaks, totals);
  if (s.kind == Loss::mart) {
    const T log_z = static_cast<T>(stats.log_z), log_w = static_cast<T>(stats.log_w);
    const Overlap overlap = over_classes<Overlap>(row, group, [&](Overlap& mine, int64_t, T z, T w) {
      mine.look(Terms<T>(s, (z - max_z) - log_z, (w - max_w) - log_w));
    });
    stats.kl = overlap.kl, stats.overlap = overlap.shared;
  }
  if (!group.leads()) return;
  stats.store(s, all.stats + r * s.stats_width());
  double loss = s.ignores(target) ? 0.0 : NAN;
  if (is_class(target, all.classes) && !s.ignores(target))
    loss = loss_of(s, stats, row.marked(s, stats, target), totals.centred, static_cast<double>(all.classes));
  all.losses[r] = static_cast<T>(loss);
}

template <class L, class T>
__device__ inline void find_losses(const Rowlosses<L, T>& all) {
  each_row(all.rows, all.classes, [&](int64_t r, const auto& group) { find_loss(all, r, group); });
}

template <class L, class T>
__global__ void __launch_bounds__(kBlock, 2) rowloss(Rowlosses<L, T> all) {
  find_losses(all);
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// The same gradient for all classes of a row.
template <class L, class T, class Group>
__device__ inline void fill_gradient(const RowlossGradients<L, T>& all, int64_t r, const Group& group, double value) {
  for (int64_t k = group.rank(); k < all.classes; k += group.size()) {
    all.to_logits[r * all.classes + k] = narrow<L>(value);
    if (all.to_natural) all.to_natural[r * all.classes + k] = narrow<L>(value);
  }
}

template <class L, class T, class Group>
__device__ inline void find_gradient(const RowlossGradients<L, T>& all, int64_t r, const Group& group) {
  const LossSettings& s = all.settings;
  const int64_t target = all.target[r];
  const double upstream = all.upstream(r);
  if (upstream == 0.0 || s.ignores(target)) return fill_gradient(all, r, group, 0.0);
  const RowStats stats(s, all.stats + r * s.stats_width());
  const bool known = upstream == upstream && stats.log_z == stats.log_z && stats.kl == stats.kl;
  if (!known || !is_class(target, all.classes)) return fill_gradient(all, r, group, NAN);

  const Classes<L> row(all, r);
  const Slopes<double> slopes(s, stats, row.marked(s, stats, target), upstream, static_cast<double>(all.classes));
  L* to_logits = all.to_logits + r * all.classes;
  L* to_natural = all.to_natural ? all.to_natural + r * all.classes : nullptr;

  const Slopes<T> rounded(slopes);
  const T max_z = static_cast<T>(stats.max_z), log_z = static_cast<T>(stats.log_z);
  const T max_w = static_cast<T>(stats.max_w), log_w = static_cast<T>(stats.log_w);
  row.each(group, [&](const auto& z, const auto& w, int64_t k) {
    auto to_z = z, to_w = w;
#pragma unroll
    for (int i = 0; i < z.size; ++i) {
      const Terms<T> terms(s, (wide(z.values[i]) - max_z) - log_z, (wide(w.values[i]) - max_w) - log_w);
      to_z.values[i] = narrow<L>(rounded.to_logits(terms, false, false));
      to_w.values[i] = narrow<L>(rounded.to_natural(terms, false));
    }
    store(to_logits + k, to_z);
    if (to_natural) store(to_natural + k, to_w);
  });
  group.sync();  // others may have written these two
  const bool mart = s.kind == Loss::mart;
  for (int64_t i = group.rank(); i < (mart ? 2 : 1); i += group.size()) {
    const int64_t k = i == 0 ? target : static_cast<int64_t>(stats.rival);
    const Terms<double> terms(s, stats.log_q(wide(row.z[k])), row.w ? stats.log_p(wide(row.w[k])) : 0.0);
    to_logits[k] = narrow<L>(slopes.to_logits(terms, i == 0, i == 1));
    if (to_natural) to_natural[k] = narrow<L>(slopes.to_natural(terms, i == 0));
  }
}

template <class L, class T>
__global__ void __launch_bounds__(kBlock, 2) rowloss_backward(RowlossGradients<L, T> all) {
  each_row(all.rows, all.classes, [&](int64_t r, const auto& group) { find_gradient(all, r, group); });
}

// ---- losses and their dual -----------------------------------------------------------------------------------------

// `solved.losses` are `all.losses`. The whole grid is resident.
template <class L, class T, class Group>
__global__ void __launch_bounds__(kBlock, 2) rowloss_dual(Rowlosses<L, T> all, Rows<T> solved, Workspace workspace) {
  find_losses(all);
  __grid_sync();
  // What the compiler knew of these before the barrier it would keep in registers, which are scarce in solve_rows.
  hide(solved.losses), hide(solved.costs), hide(solved.weights), hide(solved.n), hide(solved.rows);
  solve_rows<T, Group>(solved, workspace);
}

}  // namespace armor::cuda
