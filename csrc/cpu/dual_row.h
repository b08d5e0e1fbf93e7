// The loops over a row that armor::DualSolver asks for, on vectors of eight samples; dual.cpp compiles them by levels.h.

#include "simd.h"

template <class T>
struct RowLoops {
  // Extremes, sums and defects of the samples [begin, end).
  static Scan scan(const Row<T>& row, int64_t begin, int64_t end) {
    using namespace simd;
    const double origin = origin_of(row.losses[0]);
    Vec top = splat(-kInf), bottom = splat(kInf), ties{}, usable{}, cost_sum{}, defect{};
    Vec sum{}, sum_squares{}, sum_cubes{};
    for_vectors(begin, end, [&](int64_t i, int count) ARMOR_INLINE_LAMBDA {
      Mask here = first_lanes(count);
      Vec loss = at(row.losses + i, count, 0.0), low = loss;
      if (row.costs) {
        const Vec cost = at(row.costs + i, count, 0.0);
        const Mask barred = (cost == kInf) & (loss == loss);
        defect += barred ? Vec{} : (loss + cost) * 0.0;
        cost_sum += here & ~barred ? cost : Vec{};
        if (row.clean) {
          const Vec clean = at(row.clean + i, count, 0.0);
          loss = barred ? clean : loss;
          low = loss;
        } else {
          here &= ~barred;
        }
      } else {
        defect += loss * 0.0;
      }
      if (row.clean) {
        const Vec clean = at(row.clean + i, count, 0.0);
        defect += clean * 0.0;
        low = min(loss, clean), loss = max(loss, clean);
      }
      bottom = min(bottom, here ? low : splat(kInf));
      loss = here ? loss : splat(-kInf);
      ties = loss > top ? splat(1.0) : here & (loss == top) ? ties + 1.0 : ties;
      top = max(top, loss);
      usable += here ? splat(1.0) : Vec{};
      const Vec centred = here ? loss - origin : Vec{};
      sum += centred;
      sum_squares += centred * centred;
      sum_cubes += centred * centred * centred;
    });
    Scan out;
    out.defect = total(defect), out.cost_sum = total(cost_sum), out.usable = total(usable);
    out.sum = total(sum), out.sum_squares = total(sum_squares), out.sum_cubes = total(sum_cubes);
    for (int lane = 0; lane < kLanes; ++lane) out.merge_extremes(top[lane], bottom[lane], ties[lane]);
    return out;
  }

  // The sample with the largest loss - mu cost in [begin, end).
  static Top top(const Row<T>& row, int64_t begin, int64_t end, double mu) {
    using namespace simd;
    Vec v_top = splat(-kInf), cost_top{};
    for_vectors(begin, end, [&](int64_t i, int count) ARMOR_INLINE_LAMBDA {
      const Sample s = sample(row, i, count, mu);
      const Mask better = (s.v > v_top) & first_lanes(count);
      v_top = better ? s.v : v_top;
      cost_top = better ? s.cost : cost_top;
    });
    Top out{-kInf, 0.0};
    for (int lane = 0; lane < kLanes; ++lane)
      if (v_top[lane] > out.v) out = {v_top[lane], cost_top[lane]};
    return out;
  }

  static Sums sums(const Row<T>& row, int64_t begin, int64_t end, const Point& p) {
    const bool exponential = p.k == 0.0;
    if (row.costs) return (exponential ? sums_of<true, true> : sums_of<false, true>)(row, begin, end, p);
    return (exponential ? sums_of<true, false> : sums_of<false, false>)(row, begin, end, p);
  }

  // weights = w(b z) * scale
  static void write(const Row<T>& row, int64_t begin, int64_t end, const Point& p, double scale, T* weights) {
    using namespace simd;
    for_vectors(begin, end, [&](int64_t i, int count) ARMOR_INLINE_LAMBDA {
      const Sample s = sample(row, i, count, p.mu);
      const Vec z = s.v - p.top.v;
      Vec w;
      if (p.b == kInf) {
        w = z == 0.0 ? splat(1.0) : Vec{};
      } else {
        Vec slope;
        w = z > -1e300 ? (p.k == 0.0 ? tilt<true>(z, p, slope) : tilt<false>(z, p, slope)) : Vec{};
      }
      if (count == kLanes) store(weights + i, w * scale);
      else store(weights + i, w * scale, count);
    });
  }

 private:
  struct Sample {
    simd::Vec v, cost;  // loss - mu cost in scaled units; the cost paid
  };

  template <class Body>
  static ARMOR_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + simd::kLanes <= end; i += simd::kLanes) body(i, simd::kLanes);
    if (i < end) body(i, static_cast<int>(end - i));
  }

  static ARMOR_INLINE simd::Vec at(const T* from, int count, double fill) {
    return count == simd::kLanes ? simd::load(from) : simd::load(from, count, fill);
  }

  static ARMOR_INLINE simd::Vec scaled(const Row<T>& row, simd::Vec loss) {
    return (loss * row.scaling.unit - row.scaling.max) * row.scaling.inverse_range;
  }

  static ARMOR_INLINE Sample sample(const Row<T>& row, int64_t i, int count, double mu) {
    using namespace simd;
    Vec v = scaled(row, at(row.losses + i, count, 0.0)), cost{};
    if (row.costs) {
      cost = at(row.costs + i, count, 0.0);
      v = cost < kInf ? v - mu * cost : splat(-kInf);
    }
    if (row.clean) {
      const Vec clean = scaled(row, at(row.clean + i, count, 0.0));
      const Mask moved = v >= clean;
      v = moved ? v : clean;
      cost = moved ? cost : Vec{};
    }
    return {v, cost};
  }

  // The family's weight at y = b z, and slope = d log w / dy.
  template <bool kExponential>
  static ARMOR_INLINE simd::Vec tilt(simd::Vec z, const Point& p, simd::Vec& slope) {
    using namespace simd;
    if constexpr (kExponential) {
      slope = splat(1.0);
      return exp(p.b * z);
    } else {
      Vec ky = p.k * (p.b * z);
      const Mask active = ky > -1.0;
      ky = active ? ky : Vec{};
      const Vec u = ky + 1.0, reciprocal = 1.0 / u;
      slope = active ? reciprocal : Vec{};
      return active ? exp(log1p(ky, u, reciprocal) * (1.0 / p.k)) : Vec{};
    }
  }

  template <bool kExponential, bool kCosts>
  static Sums sums_of(const Row<T>& row, int64_t begin, int64_t end, const Point& p) {
    using namespace simd;
    Vec w_{}, wz{}, wzg{}, wzzg{}, wd{}, wdg{}, wzdg{}, wddg{}, z_min{}, d_min{}, z_out = splat(-kInf);
    for_vectors(begin, end, [&](int64_t i, int count) ARMOR_INLINE_LAMBDA {
      const Sample s = sample(row, i, count, p.mu);
      Mask here = first_lanes(count);
      Vec z = s.v - p.top.v, d = s.cost - p.top.cost;
      if constexpr (kCosts) {
        here &= z > -1e300;  // an infinite cost is never paid
        z = here ? z : Vec{};
        d = here ? d : Vec{};
      }
      Vec slope, w = tilt<kExponential>(z, p, slope);
      if (kCosts || count < kLanes) w = here ? w : Vec{};
      const Vec wzi = w * z, zg = kExponential ? z : z * slope;
      w_ += w;
      wz += wzi;
      wzzg += wzi * zg;
      if constexpr (!kExponential) {
        wzg += w * zg;
        z_out = here & (w == 0.0) ? max(z_out, z) : z_out;
        const Mask lower = (z < z_min) & (w > 0.0);
        z_min = lower ? z : z_min;
        if constexpr (kCosts) d_min = lower ? d : d_min;
      }
      if constexpr (kCosts) {
        const Vec wdi = w * d;
        wd += wdi;
        wzdg += wdi * zg;
        const Vec wdgi = kExponential ? wdi : wdi * slope;
        wdg += wdgi;
        wddg += wdgi * d;
      }
    });
    Sums out;
    out.w = total(w_), out.wz = total(wz), out.wzzg = total(wzzg);
    out.wzg = kExponential ? out.wz : total(wzg);
    out.wd = total(wd), out.wdg = total(wdg), out.wzdg = total(wzdg), out.wddg = total(wddg);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (z_min[lane] < out.z_min) out.z_min = z_min[lane], out.d_min = d_min[lane];
      out.z_out = std::fmax(out.z_out, z_out[lane]);
    }
    return out;
  }
};
