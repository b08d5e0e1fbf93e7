// armor::dual on CUDA: one launch solves every row, with the whole iteration on the device (docs/solver.md). A row is
// worked on by a group of threads, a warp, a block or the whole grid, by its length. The threads of a group add up what
// RowSolver asks for; its leader, the first thread, keeps the solver and tells the others where to look next.
#pragma once

#include <new>
#include <type_traits>

#include "armor/row.h"
#include "portable.cuh"

namespace armor::cuda {

constexpr int kWarp = 32;
constexpr int kBlock = 256;           // threads of a block in every launch
constexpr int kWarps = kBlock / kWarp;
constexpr int64_t kWarpRow = 256;     // rows up to this length take a warp,
constexpr int64_t kBlockRow = 16384;  // up to this one a block, longer ones the grid

// The first threads of every block of a grid-wide row meet here: two sets of one partial result per block.
struct Workspace {
  double* partials;
};

// ---- partial results and how they travel ---------------------------------------------------------------------------

// How many NaN, +inf and -inf decide a row that is not finite.
struct Odd {
  double nan = 0.0, plus = 0.0, minus = 0.0;
  ARMOR_FN void add(const Odd& o) { nan += o.nan, plus += o.plus, minus += o.minus; }
};

// doubles of the widest partial result
constexpr int kWidest = (sizeof(Sums) > sizeof(Scan) ? sizeof(Sums) : sizeof(Scan)) / sizeof(double);

// The partial result of the lane `distance` away. It is made of doubles only, or of floats only.
template <class Part>
__device__ inline Part from_lane(const Part& part, int distance) {
  using Word = std::conditional_t<alignof(Part) == alignof(double), double, float>;
  Part other = part;
  Word* words = reinterpret_cast<Word*>(&other);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Part) / sizeof(Word)); ++i)
    words[i] = __shfl_xor_sync(0xffffffffu, words[i], distance);
  return other;
}

// Added over a warp, always in the same order. Lane 0 has the result, and every lane if a.add(b) and b.add(a) agree.
template <class Part>
__device__ inline Part over_warp(Part part) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) part.add(from_lane(part, distance));
  return part;
}

// A group tells a thread which samples and rows are its own. `reduce` adds up a partial result of every thread: the
// leader gets the sum, and afterwards no thread still reads what the leader told before. `all` gives every thread the
// sum of partial results that can be added in either order.
struct WarpGroup {
  static constexpr int kSolvers = kWarps;  // groups in a block
  __device__ WarpGroup(double*, Workspace) {}
  __device__ int64_t first_row() const { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }
  __device__ int64_t row_step() const { return static_cast<int64_t>(gridDim.x) * kWarps; }
  __device__ int64_t rank() const { return threadIdx.x % kWarp; }
  __device__ int64_t size() const { return kWarp; }
  __device__ int solver() const { return threadIdx.x / kWarp; }
  __device__ bool leads() const { return rank() == 0; }
  __device__ bool writes() const { return leads(); }
  __device__ void sync() const { __syncwarp(); }
  template <class Part>
  __device__ Part reduce(const Part& mine) {
    const Part part = over_warp(mine);
    __syncwarp();
    return part;
  }
  template <class Part>
  __device__ Part all(const Part& mine) const {
    return over_warp(mine);
  }
};

struct BlockGroup {
  double* scratch;  // kWarps partial results

  static constexpr int kSolvers = 1;
  __device__ BlockGroup(double* scratch_, Workspace) : scratch(scratch_) {}
  __device__ int64_t first_row() const { return blockIdx.x; }
  __device__ int64_t row_step() const { return gridDim.x; }
  __device__ int64_t rank() const { return threadIdx.x; }
  __device__ int64_t size() const { return kBlock; }
  __device__ int solver() const { return 0; }
  __device__ bool leads() const { return threadIdx.x == 0; }
  __device__ bool writes() const { return leads(); }
  __device__ void sync() const { __syncthreads(); }
  template <class Part>
  __device__ Part reduce(const Part& mine) {
    Part part = over_warp(mine);
    const Part* parts = of_warps(part);
    if (threadIdx.x == 0)
      for (int warp = 1; warp < kWarps; ++warp) part.add(parts[warp]);
    return part;
  }
  template <class Part>
  __device__ Part all(const Part& mine) const {
    const Part* parts = of_warps(over_warp(mine));
    Part part = parts[0];
    for (int warp = 1; warp < kWarps; ++warp) part.add(parts[warp]);
    return part;
  }

 private:
  // What the first thread of every warp has, for all to read.
  template <class Part>
  __device__ const Part* of_warps(const Part& part) const {
    __syncthreads();  // the scratch of the reduction before has been read
    Part* parts = reinterpret_cast<Part*>(scratch);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = part;
    __syncthreads();
    return parts;
  }
};

// Every block runs a copy of the solver on the same sums, so only partial results cross the grid.
struct GridGroup {
  BlockGroup block;
  double* partials;
  int turn = 0;

  static constexpr int kSolvers = 1;
  __device__ GridGroup(double* scratch, Workspace workspace)
      : block(scratch, workspace), partials(workspace.partials) {}
  __device__ int64_t first_row() const { return 0; }
  __device__ int64_t row_step() const { return 1; }
  __device__ int64_t rank() const { return static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; }
  __device__ int64_t size() const { return static_cast<int64_t>(gridDim.x) * kBlock; }
  __device__ int solver() const { return 0; }
  __device__ bool leads() const { return threadIdx.x == 0; }
  __device__ bool writes() const { return leads() && blockIdx.x == 0; }
  __device__ void sync() const { __syncthreads(); }
  template <class Part>
  __device__ Part reduce(const Part& mine) {
    constexpr int words = sizeof(Part) / sizeof(double);
    static_assert(words <= kWidest, "the workspace is laid out for the widest partial result");
    const Part part = block.reduce(mine);
    double* set = partials + static_cast<int64_t>(turn) * gridDim.x * kWidest;
    turn ^= 1;  // a block is never more than one barrier ahead, so two sets are enough
    if (threadIdx.x == 0)
      for (int i = 0; i < words; ++i) set[blockIdx.x * kWidest + i] = reinterpret_cast<const double*>(&part)[i];
    __grid_sync();
    Part all;
    for (int b = threadIdx.x; b < static_cast<int>(gridDim.x); b += kBlock) {
      Part other;
      for (int i = 0; i < words; ++i) reinterpret_cast<double*>(&other)[i] = set[b * kWidest + i];
      all.add(other);
    }
    return block.reduce(all);
  }
};

// ---- one sample ----------------------------------------------------------------------------------------------------

template <class T>
struct Row {
  const T *losses, *costs, *clean;
  T* weights;
  int64_t n;
};

struct Sample {
  double v, cost;  // loss - mu cost in scaled units; the cost paid
};

template <class T>
__device__ inline Sample sample(const Row<T>& row, int64_t i, const Scaling& s, double mu) {
  Sample out{(static_cast<double>(row.losses[i]) * s.unit - s.max) * s.inverse_range, 0.0};
  if (row.costs) {
    out.cost = static_cast<double>(row.costs[i]);
    out.v = out.cost < kInf ? out.v - mu * out.cost : -kInf;
  }
  if (row.clean) {
    const double clean = (static_cast<double>(row.clean[i]) * s.unit - s.max) * s.inverse_range;
    if (!(out.v >= clean)) out = {clean, 0.0};
  }
  return out;
}

// The family's weight at b z, and slope = d log w / d(b z).
__device__ inline double tilt(double z, const Point& p, double& slope) {
  slope = 1.0;
  if (p.k == 0.0) return exp(p.b * z);
  const double ky = p.k * (p.b * z), u = 1.0 + ky;
  slope = u > 0.0 ? 1.0 / u : 0.0;
  return u > 0.0 ? exp(log1p(ky) / p.k) : 0.0;
}

// ---- the kernels ---------------------------------------------------------------------------------------------------

// What the leader tells its group.
struct Order {
  Scaling scaling;
  Point point;
  double scale;
  bool done;
};

template <class T, class Group>
class Worker {
 public:
  __device__ Worker(Group& group_, const Row<T>& row_) : group(group_), row(row_) {}

  __device__ Scan scan() const {
    Scan mine;
    const double origin = origin_of(static_cast<double>(row.losses[0]));
    each([&](int64_t i) {
      mine.look(static_cast<double>(row.losses[i]), row.costs ? static_cast<double>(row.costs[i]) : 0.0,
                row.clean != nullptr, row.clean ? static_cast<double>(row.clean[i]) : 0.0, origin);
    });
    return group.reduce(mine);
  }

  __device__ Top top(const Scaling& scaling, double mu) const {
    Top mine;
    each([&](int64_t i) {
      const Sample s = sample(row, i, scaling, mu);
      mine.add({s.v, s.cost});
    });
    return group.reduce(mine);
  }

  __device__ Sums sums(const Scaling& scaling, const Point& p) const {
    Sums mine;
    each([&](int64_t i) {
      const Sample s = sample(row, i, scaling, p.mu);
      const double z = s.v - p.top.v, d = s.cost - p.top.cost;
      if (!(z > -1e300)) return;  // an infinite cost is never paid
      double slope;
      const double w = tilt(z, p, slope), zg = z * slope, dg = d * slope;
      mine.w += w, mine.wz += w * z, mine.wzg += w * zg, mine.wzzg += w * z * zg;
      mine.wd += w * d, mine.wdg += w * dg, mine.wzdg += w * z * dg, mine.wddg += w * d * dg;
      if (w == 0.0) mine.z_out = fmax(mine.z_out, z);
      else if (z < mine.z_min) mine.z_min = z, mine.d_min = d;
    });
    return group.reduce(mine);
  }

  __device__ void write(const Order& order) const {
    const Point& p = order.point;
    each([&](int64_t i) {
      const double z = sample(row, i, order.scaling, p.mu).v - p.top.v;
      double slope, w = 0.0;
      if (p.b == kInf) w = z == 0.0 ? 1.0 : 0.0;
      else if (z > -1e300) w = tilt(z, p, slope);
      row.weights[i] = static_cast<T>(w * order.scale);
    });
  }

  // NaN wins over +inf, and +inf over -inf; the weights are uniform on the entries that decide.
  __device__ double nonfinite(Order& order) const {
    Odd mine;
    each([&](int64_t i) {
      const double e = entry(i);
      if (e != e) mine.nan += 1.0;
      else if (e == kInf) mine.plus += 1.0;
      else if (e == -kInf) mine.minus += 1.0;
    });
    const Odd odd = group.reduce(mine);
    if (group.leads()) {
      order.point.b = odd.nan > 0.0 ? NAN : odd.plus > 0.0 ? kInf : -kInf;
      order.scale = 1.0 / (odd.plus > 0.0 ? odd.plus : odd.minus);
    }
    group.sync();
    const double worst = order.point.b, share = order.scale;
    each([&](int64_t i) { row.weights[i] = static_cast<T>(worst != worst ? worst : entry(i) == worst ? share : 0.0); });
    return worst;
  }

 private:
  Group& group;
  Row<T> row;

  template <class Body>
  __device__ void each(const Body& body) const {
    for (int64_t i = group.rank(); i < row.n; i += group.size()) body(i);
  }

  __device__ double entry(int64_t i) const {
    return deciding_entry(static_cast<double>(row.losses[i]), row.costs ? static_cast<double>(row.costs[i]) : 0.0,
                          row.clean != nullptr, row.clean ? static_cast<double>(row.clean[i]) : 0.0);
  }
};

// Every thread of the launch calls it. One whose group has no row returns at once.
template <class T, class Group>
__device__ inline void solve_rows(const Rows<T>& all, const Workspace& workspace) {
  SHARED_ARRAY(double, scratch, kWarps* kWidest);
  SHARED_ARRAY(double, solvers, Group::kSolvers*((sizeof(RowSolver) + 7) / 8));
  SHARED_ARRAY(double, orders, Group::kSolvers*((sizeof(Order) + 7) / 8));
  Group group(scratch, workspace);
  RowSolver* solver = reinterpret_cast<RowSolver*>(solvers + group.solver() * ((sizeof(RowSolver) + 7) / 8));
  Order& order = *reinterpret_cast<Order*>(orders + group.solver() * ((sizeof(Order) + 7) / 8));

  for (int64_t r = group.first_row(); r < all.rows; r += group.row_step()) {
    const Row<T> row{all.losses + r * all.n, all.costs ? all.costs + r * all.n : nullptr,
                     all.clean ? all.clean + r * all.n : nullptr, all.weights + r * all.n, all.n};
    const Worker<T, Group> worker(group, row);
    const Scan scan = worker.scan();
    if (group.leads()) {
      new (solver) RowSolver(all.settings, scan, static_cast<double>(all.n),
                             origin_of(static_cast<double>(row.losses[0])));
      order = {solver->scaling, solver->point, scan.defect == 0.0 && scan.usable > 0.0 ? 1.0 : 0.0,
               solver->done};
    }
    group.sync();
    const bool finite = order.scale == 1.0;
    while (finite && !order.done) {
      if (row.costs) {
        const Top top = worker.top(order.scaling, order.point.mu);
        if (group.leads()) order.point.top = top;
        group.sync();
      }
      const Sums sums = worker.sums(order.scaling, order.point);
      if (group.leads()) {
        solver->update(sums, order.point.top);
        order.point = solver->point, order.done = solver->done;
      }
      group.sync();
    }
    Result result{};
    group.sync();
    if (finite) {
      if (group.leads()) {
        result = solver->result();
        order.point = solver->point, order.scale = result.weight_scale;
      }
      group.sync();
      worker.write(order);
    } else {
      const double worst = worker.nonfinite(order);
      result = {worst, worst != worst ? worst : 0.0, worst, 0.0, Status::nonfinite};
    }
    if (group.writes()) {
      all.value[r] = static_cast<T>(result.value);
      all.lam[r] = static_cast<T>(result.lam);
      all.nu[r] = static_cast<T>(result.nu);
      all.status[r] = static_cast<int>(result.status);
      all.passes[r] = finite ? solver->passes : 1;
    }
    group.sync();  // the order is read until here
  }
}

template <class T, class Group>
__global__ void __launch_bounds__(kBlock, 2) dual(Rows<T> all, Workspace workspace) {
  solve_rows<T, Group>(all, workspace);
}

template <class T>
__global__ void __launch_bounds__(kBlock) dual_backward(Gradients<T> g) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < g.rows * g.n; i += step)
    g.write(i / g.n, i);
}

}  // namespace armor::cuda
