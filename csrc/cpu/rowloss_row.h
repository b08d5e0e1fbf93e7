// The loops over the classes of a row that armor/rowloss.h asks for, a vector of classes at a time; rowloss.cpp
// compiles them by levels.h. Float32 sums run over blocks of 256 classes, and the sums of blocks in float64.

#include "simd.h"
#include "lanes.h"

template <class L>
struct RowlossLoops {
  using R = RealOf<L>;  // in which a class is computed
  using Vec = typename lanes::Lanes<R>::Vec;
  using Mask = typename lanes::Lanes<R>::Mask;

  static void losses(const Rowlosses<L, R>& all, int64_t begin, int64_t end) {
    switch (all.settings.kind) {
      case Loss::ce:
        return all.settings.smoothing == 0.0 ? losses_of<Loops::ce>(all, begin, end)
                                             : losses_of<Loops::smooth_ce>(all, begin, end);
      case Loss::mart: return losses_of<Loops::mart>(all, begin, end);
      default: return losses_of<Loops::kl>(all, begin, end);
    }
  }

  static void gradients(const RowlossGradients<L, R>& all, int64_t begin, int64_t end) {
    switch (all.settings.kind) {
      case Loss::ce: return gradients_of<Loops::ce, false>(all, begin, end);
      case Loss::mart:
        return all.to_natural ? gradients_of<Loops::mart, true>(all, begin, end)
                              : gradients_of<Loops::mart, false>(all, begin, end);
      default:
        return all.to_natural ? gradients_of<Loops::kl, true>(all, begin, end)
                              : gradients_of<Loops::kl, false>(all, begin, end);
    }
  }

 private:
  enum class Loops { ce, smooth_ce, kl, mart };  // TRADES and KL sum up the same

  static constexpr int kCount = lanes::Lanes<R>::kCount;
  static constexpr int64_t kBlock = 16 * kCount;

  // A row's logits, and a target that is a class even where the given one is not. A row shorter than a vector is
  // copied and filled up with -inf, so that every row can be read by whole vectors.
  struct Row {
    const L *z, *w;
    int64_t classes, length, target;
    bool valid;

    template <class All>
    Row(const All& all, int64_t r)
        : z(all.logits + r * all.classes), w(all.natural ? all.natural + r * all.classes : nullptr),
          classes(all.classes), length(std::max<int64_t>(classes, kCount)), target(all.target[r]),
          valid(is_class(target, classes)) {
      if (!valid) target = 0;
      if (classes == length) return;
      z = filled_up(z, short_z);
      if (w) w = filled_up(w, short_w);
    }
    Row(const Row&) = delete;

    Marked marked(double rival) const {
      return {logit(z, target), w ? logit(w, target) : 0.0, logit(z, static_cast<int64_t>(rival))};
    }

   private:
    alignas(64) L short_z[kCount], short_w[kCount];

    const L* filled_up(const L* from, L* to) const {
      std::fill_n(to, kCount, static_cast<L>(-kInf));
      std::memcpy(to, from, sizeof(L) * classes);
      return to;
    }
  };

  static double logit(const L* row, int64_t k) { return static_cast<double>(static_cast<R>(row[k])); }
  static ARMOR_INLINE Vec lowest() { return Vec{} - static_cast<R>(kInf); }
  // `x` in the lanes from `seen` on, elsewhere -inf.
  static ARMOR_INLINE Vec unseen(Vec x, int seen) {
    return seen == 0 ? x : lanes::Lanes<R>::numbers() >= seen ? x : lowest();
  }

  // body(k) for the vectors of classes from k on. The last one ends with the row and overlaps the one before.
  template <class Body>
  static ARMOR_INLINE void for_vectors(int64_t length, const Body& body) {
    for (int64_t k = 0; k < length; k += kCount) body(std::min(k, length - kCount));
  }
  // The same for sums, in which `seen` lanes of the last vector are not new. Its body is compiled twice.
  template <class Body>
  static ARMOR_INLINE void for_new_classes(int64_t begin, int64_t end, const Body& body) {
    int64_t k = begin;
    for (; k + kCount <= end; k += kCount) body(k, 0);
    if (k < end) body(end - kCount, static_cast<int>(k + kCount - end));
  }
  template <class Body>
  static ARMOR_INLINE void for_blocks(int64_t length, const Body& body) {
    for (int64_t k = 0; k < length; k += kBlock) body(k, std::min(length, k + kBlock));
  }

  // ---- forward ----------------------------------------------------------------------------------------------------

  template <Loops kLoops>
  static void losses_of(const Rowlosses<L, R>& all, int64_t begin, int64_t end) {
    const LossSettings& s = all.settings;
    for (int64_t r = begin; r < end; ++r) {
      const Row row(all, r);
      const Peaks peaks = peaks_of<kLoops>(row);
      const Totals totals = totals_of<kLoops>(row, peaks);
      RowStats stats(s, peaks, totals);
      if constexpr (kLoops == Loops::mart) {
        const Overlap overlap = overlap_of(row, stats);
        stats.kl = overlap.kl, stats.overlap = overlap.shared;
      }
      stats.store(s, all.stats + r * s.stats_width());
      const double loss = loss_of(s, stats, row.marked(stats.rival), totals.centred, static_cast<double>(row.classes));
      all.losses[r] = static_cast<R>(s.ignores(all.target[r]) ? 0.0 : row.valid ? loss : NAN);
    }
  }

  template <Loops kLoops>
  static ARMOR_INLINE Peaks peaks_of(const Row& row) {
    Vec z = lowest(), w = lowest();
    for_vectors(row.length, [&](int64_t k) ARMOR_INLINE_LAMBDA {
      z = lanes::max(lanes::load(row.z + k), z);
      if constexpr (has_natural(kLoops)) w = lanes::max(lanes::load(row.w + k), w);
    });
    Peaks out;
    out.z = lanes::largest<R>(z);
    if constexpr (has_natural(kLoops)) out.w = lanes::largest<R>(w);
    if constexpr (kLoops == Loops::mart) look_for_rival(row, out);
    return out;
  }

  static void look_for_rival(const Row& row, Peaks& out) {
    using Index = std::decay_t<decltype(Mask{}[0])>;
    const Index target = static_cast<Index>(row.target), first = target == 0;
    Vec z = lowest();
    Mask rival = Mask{} + first;
    for_vectors(row.length, [&](int64_t k) ARMOR_INLINE_LAMBDA {
      const Vec z_k = lanes::load(row.z + k);
      const Mask numbers = lanes::Lanes<R>::numbers() + static_cast<Index>(k);
      const Mask better = (z_k > z) & (numbers != target);
      z = better ? z_k : z;
      rival = better ? numbers : rival;
    });
    const R largest = lanes::largest<R>(z);
    const Mask candidates = z == largest ? rival : Mask{} + std::numeric_limits<Index>::max();
    out.rival = static_cast<double>(lanes::smallest<R>(candidates));
  }

  template <Loops kLoops>
  static ARMOR_INLINE Totals totals_of(const Row& row, const Peaks& peaks) {
    const R max_z = static_cast<R>(peaks.z), max_w = static_cast<R>(peaks.w);
    lanes::Doubles ties_z{}, below_z{}, ties_w{}, below_w{}, cross{}, centred{};
    for_blocks(row.length, [&](int64_t begin, int64_t end) ARMOR_INLINE_LAMBDA {
      Vec block_ties_z{}, block_below_z{}, block_ties_w{}, block_below_w{}, block_cross{}, block_centred{};
      for_new_classes(begin, end, [&](int64_t k, int seen) ARMOR_INLINE_LAMBDA {
        const Vec b = unseen(lanes::load(row.z + k), seen) - max_z, e = lanes::exp(b);
        block_ties_z += b == R(0) ? e : Vec{};
        block_below_z += b == R(0) ? Vec{} : e;
        if constexpr (kLoops == Loops::smooth_ce) {
          const int present = static_cast<int>(std::min<int64_t>(row.classes - k, kCount));
          const Mask numbers = lanes::Lanes<R>::numbers();
          block_centred += (numbers >= seen) & (numbers < present) ? b : Vec{};
        }
        if constexpr (has_natural(kLoops)) {
          const Vec a = unseen(lanes::load(row.w + k), seen) - max_w, f = lanes::exp(a);
          block_ties_w += a == R(0) ? f : Vec{};
          block_below_w += a == R(0) ? Vec{} : f;
          if constexpr (kLoops == Loops::kl) block_cross += f == R(0) ? Vec{} : f * (a - b);
        }
      });
      ties_z += lanes::widened(block_ties_z), below_z += lanes::widened(block_below_z);
      ties_w += lanes::widened(block_ties_w), below_w += lanes::widened(block_below_w);
      cross += lanes::widened(block_cross), centred += lanes::widened(block_centred);
    });
    using lanes::total;
    return {{total(ties_z), total(below_z)}, {total(ties_w), total(below_w)}, total(cross), total(centred)};
  }

  static Overlap overlap_of(const Row& row, const RowStats& stats) {
    const Normaliser normal(stats);
    lanes::Doubles kl{}, shared{};
    for_blocks(row.length, [&](int64_t begin, int64_t end) ARMOR_INLINE_LAMBDA {
      Vec block_kl{}, block_shared{};
      for_new_classes(begin, end, [&](int64_t k, int seen) ARMOR_INLINE_LAMBDA {
        const VecTerms t = terms<Loops::mart>(normal, lanes::load(row.z + k), unseen(lanes::load(row.w + k), seen));
        block_kl += t.p * t.h, block_shared += t.shared;
      });
      kl += lanes::widened(block_kl), shared += lanes::widened(block_shared);
    });
    return {lanes::total(kl), lanes::total(shared)};
  }

  // ---- Terms of armor/rowloss.h, a vector of classes at a time ----------------------------------------------------

  static constexpr bool has_natural(Loops loops) { return loops == Loops::kl || loops == Loops::mart; }

  struct Normaliser {
    R max_z, log_z, scale_z, max_w, log_w, scale_w;

    explicit Normaliser(const RowStats& r)
        : max_z(static_cast<R>(r.max_z)), log_z(static_cast<R>(r.log_z)), scale_z(static_cast<R>(std::exp(-r.log_z))),
          max_w(static_cast<R>(r.max_w)), log_w(static_cast<R>(r.log_w)), scale_w(static_cast<R>(std::exp(-r.log_w))) {}
  };
  struct VecTerms {
    Vec p, q, h, shared;
  };

  template <Loops kLoops>
  static ARMOR_INLINE VecTerms terms(const Normaliser& n, Vec z, Vec w) {
    VecTerms t{};
    const Vec b = z - n.max_z;
    t.q = lanes::exp(b, n.scale_z);
    if constexpr (has_natural(kLoops)) {
      const Vec a = w - n.max_w;
      t.p = lanes::exp(a, n.scale_w);
      Vec h = (a - b) - (n.log_w - n.log_z);
      if constexpr (kLoops == Loops::mart) {
        const R floor = static_cast<R>(kFloor);
        const Mask above = t.q > floor;
        const Vec share = above ? floor / t.q : t.q / floor;  // of the smaller in the larger
        h = (a - n.log_w) - ((above ? b - n.log_z : Vec{} + static_cast<R>(kLogFloor)) + lanes::log1p<R>(share));
        t.shared = t.p * (above ? Vec{} + R(1) : share) / (share + R(1));
      }
      t.h = t.p == R(0) ? Vec{} : h;
    }
    return t;
  }

  // ---- backward ---------------------------------------------------------------------------------------------------

  template <Loops kLoops, bool kNatural>
  static void gradients_of(const RowlossGradients<L, R>& all, int64_t begin, int64_t end) {
    const LossSettings& s = all.settings;
    alignas(64) L short_z[kCount], short_w[kCount];
    for (int64_t r = begin; r < end; ++r) {
      const Row row(all, r);
      L *to_z = all.to_logits + r * row.classes, *to_w = kNatural ? all.to_natural + r * row.classes : nullptr;
      const R upstream = all.upstream(r);
      const RowStats stats(s, all.stats + r * s.stats_width());
      const bool unmoved = upstream == R(0) || s.ignores(all.target[r]);
      if (unmoved || !row.valid || std::isnan(upstream) || std::isnan(stats.log_z) || std::isnan(stats.kl)) {
        const L same = static_cast<L>(unmoved ? R(0) : static_cast<R>(NAN));
        std::fill_n(to_z, row.classes, same);
        if constexpr (kNatural) std::fill_n(to_w, row.classes, same);
        continue;
      }
      const Slopes<double> slopes(s, stats, row.marked(stats.rival), upstream, static_cast<double>(row.classes));
      if (row.length == row.classes) {
        write_all<kLoops, kNatural>(row, Normaliser(stats), Slopes<R>(slopes), to_z, to_w);
      } else {
        write_all<kLoops, kNatural>(row, Normaliser(stats), Slopes<R>(slopes), short_z, short_w);
        std::memcpy(to_z, short_z, sizeof(L) * row.classes);
        if constexpr (kNatural) std::memcpy(to_w, short_w, sizeof(L) * row.classes);
      }
      write_one(row, s, stats, slopes, row.target, to_z, to_w);
      if constexpr (kLoops == Loops::mart)
        write_one(row, s, stats, slopes, static_cast<int64_t>(stats.rival), to_z, to_w);
    }
  }

  template <Loops kLoops, bool kNatural>
  static void write_all(const Row& row, const Normaliser& normal, const Slopes<R>& c, L* to_z, L* to_w) {
    for_vectors(row.length, [&](int64_t k) ARMOR_INLINE_LAMBDA {
      Vec w{};
      if constexpr (has_natural(kLoops)) w = lanes::load(row.w + k);
      const VecTerms t = terms<kLoops>(normal, lanes::load(row.z + k), w);
      if constexpr (kLoops == Loops::ce) lanes::store(to_z + k, c.q * t.q + c.shift);
      else if constexpr (kLoops == Loops::mart) lanes::store(to_z + k, c.q * t.q + c.shared * t.shared);
      else lanes::store(to_z + k, c.gap * (t.q - t.p));
      if constexpr (kNatural)
        lanes::store(to_w + k, t.p == R(0) ? Vec{} : t.p * (c.natural + c.natural_h * (t.h - c.kl)));
    });
  }

  // The target's class and the rival in float64: their gradients may be small differences.
  static void write_one(const Row& row, const LossSettings& s, const RowStats& stats, const Slopes<double>& slopes,
                        int64_t k, L* to_z, L* to_w) {
    const bool is_target = k == row.target;
    const Terms<double> t(s, stats.log_q(logit(row.z, k)), row.w ? stats.log_p(logit(row.w, k)) : 0.0);
    to_z[k] = static_cast<L>(static_cast<R>(slopes.to_logits(t, is_target, !is_target)));
    if (to_w) to_w[k] = static_cast<L>(static_cast<R>(slopes.to_natural(t, is_target)));
  }
};
