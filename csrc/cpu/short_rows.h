#pragma once
// Row losses with the lanes across items: for rows too short to fill vectors, and for layouts such
// as (N, C, H, W) where neighbouring items, not columns, are neighbours in memory. The arithmetic
// of an item is that of long_rows.h, operation by operation, so the bits are the same.
#include "core/exact_bins.h"
#include "core/row_items.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class T>
struct ShortRows {
  typedef Vector<T> V;
  static constexpr int kLanes = lanes<V>;

  const RowArgs& args;
  const typename Loss::template Call<T> call;
  const ItemScale<T> item_scale;
  V* const tile;           // (columns): logits, then terms, then the gradient
  V* const probabilities;  // (columns): of the target, then q_j
  V* const raw;            // (columns): logits without a soft cap, where there is one

  MBK_FN ShortRows(const RowArgs& a, char* scratch)
      : args(a),
        call(a),
        item_scale(a),
        tile((V*)scratch),
        probabilities((V*)scratch + a.columns),
        raw((V*)scratch + 2 * a.columns) {}

  template <class W>
  MBK_FN W join(W* sum) const {
    int count = args.columns < kGroup ? (int)args.columns : kGroup;
    for (int half = kGroup / 2; half; half /= 2) {
      for (int k = 0; k + half < count; ++k) sum[k] = sum[k] + sum[k + half];
      if (count > half) count = half;
    }
    return sum[0];
  }

  MBK_FN T* state(int64_t first, int which) const {
    return (T*)args.row_state + which * args.items + first;
  }
  MBK_FN V load_state(int64_t first, int count, int which) const {
    T v[kLanes] = {};
    memcpy(v, state(first, which), (size_t)count * sizeof(T));
    return load<V>(v);
  }
  MBK_FN void save_state(int64_t first, int count, int which, V value) const {
    memcpy(state(first, which), &value, (size_t)count * sizeof(T));
  }

  // What is known of each item without its logits.
  struct Lanes {
    int64_t index[kLanes];
    T target[kLanes], target_weight[kLanes], sample_weight[kLanes];
    double scale[kLanes];  // rounded only where the result is

    MBK_FN Lanes(const ShortRows& rows, int64_t first, int count) {
      const RowArgs& a = rows.args;
      ItemPosition at(a, first);
      for (int l = 0; l < kLanes; ++l) {
        index[l] = Loss::kHasIndex ? item_target(a, at) : -1;
        target[l] = (T)index[l];  // as a number of the lane type: columns are few
        target_weight[l] =
            a.class_weight && index[l] >= 0 ? ((const T*)a.class_weight)[index[l]] : 1;
        sample_weight[l] = item_value<T>(a.sample_weight, a.sample_weight_strides, at);
        scale[l] = rows.item_scale(a, at);
        if (l + 1 < count) at.advance(a);  // lanes without an item repeat the last
      }
    }
  };

  struct Sums {
    V of[3];
    V coefficient;  // of the columns `apart`
    f64v distance[kParts<V>];
  };
  // The sums without the terms and coefficients of the columns `apart`, by lane.
  MBK_FN Sums sums(V m, V apart) const {
    Sums result{};
    constexpr int kWide = Loss::kWideDistance ? kParts<V> : 1;
    typedef typename Pick<Loss::kWideDistance, f64v, V>::type W;
    V sum[kGroup], coefficient[kGroup];
    W distance[kWide][kGroup];
    const int used = args.columns < kGroup ? (int)args.columns : kGroup;
    for (int k = 0; k < used; ++k) {
      sum[k] = coefficient[k] = V{};
      for (auto& part : distance) part[k] = W{};
    }
    for (int64_t j = 0; j < args.columns; ++j) {
      const int k = (int)(j % kGroup);
      const auto is_apart = apart == splat<V>((T)j);
      const V d = tile[j] - m, e = Loss::term(d);
      sum[k] = sum[k] + select(is_apart, V{}, e);
      if constexpr (Loss::kHasCoefficients) {
        const V w = splat<V>(args.class_weight ? ((const T*)args.class_weight)[j] : (T)1);
        const V q = probabilities[j] = Loss::coefficient(call, w, probabilities[j]);
        if constexpr (Loss::kWideDistance) {
          for (int p = 0; p < kWide; ++p)
            distance[p][k] = Loss::add_distance(to_double(tile[j], p) - to_double(m, p),
                                                to_double(q, p), distance[p][k]);
        } else {
          distance[0][k] = Loss::add_distance(d, q, distance[0][k]);
        }
        if constexpr (Loss::kSums > 2) {
          coefficient[k] = coefficient[k] + select(is_apart, V{}, q);
          result.coefficient = select(is_apart, q, result.coefficient);
        }
      }
      if constexpr (!Loss::kHasSoftcap) tile[j] = e;
    }
    result.of[Loss::kRest] = join(sum);
    for (int p = 0; p < kParts<V>; ++p) {
      if constexpr (Loss::kWideDistance) {
        result.distance[p] = join(distance[p]);
      } else if constexpr (Loss::kHasCoefficients) {
        result.distance[p] = to_double(p ? distance[0][0] : join(distance[0]), p);
      }
    }
    if constexpr (Loss::kSums > 2) result.of[Loss::kCoefficients] = join(coefficient);
    return result;
  }

  // Items [first, first + count), whose logits are in the tile. Their losses go to `losses`, their
  // gradients, if wanted, into the tile. Returns which items are ignored.
  MBK_PASS V items(int64_t first, int count, bool want_gradient, T* losses) const {
    const V infinity = splat<V>((T)__builtin_inff()), zero = V{};
    const V not_a_number = canonical(splat<V>((T)__builtin_nanf("")));
    const Lanes lane(*this, first, count);
    const V t = load<V>(lane.target);
    const V ignored = Loss::kHasIndex ? select(t < zero, splat<V>(1), zero) : zero;

    V m = -infinity;
    Int<V> nan = Int<V>{};
    for (int64_t j = 0; j < args.columns; ++j) {
      if constexpr (Loss::kHasSoftcap) raw[j] = tile[j];
      tile[j] = Loss::logit(call, tile[j]);
      m = max(tile[j], m);
      nan |= is_nan(tile[j]);
    }
    m = m + zero;
    if (args.from_state) m = load_state(first, count, 0);
    // As in long_rows.h; the lanes of such items compute nonsense that is replaced at the end.
    const auto bad = (Int<V>{} | (nan != 0) | !(abs(m) < infinity)) != 0;
    m = select(bad, zero, m);
    T target_logit[kLanes];
    for (int l = 0; l < kLanes; ++l)
      target_logit[l] = ((const T*)tile)[(lane.index[l] < 0 ? 0 : lane.index[l]) * kLanes + l];

    V apart = t;
    if constexpr (!Loss::kHasIndex) {  // the first maximum
      for (int64_t j = args.columns - 1; j >= 0; --j)
        apart = select(tile[j] == m, splat<V>((T)j), apart);
    }
    Sums s = sums(m, apart);
    if (args.from_state) {
      s.of[Loss::kRest] = load_state(first, count, 1);
      if (Loss::kSums > 2) s.of[2] = load_state(first, count, 2);
    } else if (args.row_state) {
      save_state(first, count, 0, select(ignored != zero, zero, select(bad, not_a_number, m)));
      save_state(first, count, 1,
                 select(ignored != zero, zero, select(bad, not_a_number, s.of[Loss::kRest])));
      if (Loss::kSums > 2) save_state(first, count, 2, select(bad, not_a_number, s.of[2]));
    }

    f64v loss[kParts<V>], factor[kParts<V>], target_gradient[kParts<V>], scale[kParts<V>];
    const V logit = load<V>(target_logit), term = Loss::term(logit - m);
    const V weight = Loss::kHasIndex ? load<V>(lane.target_weight) : s.coefficient;
    V slope = splat<V>(1);
    if constexpr (Loss::kHasSoftcap) {
      V x = V{};
      for (int64_t j = 0; j < args.columns; ++j) x = select(apart == splat<V>((T)j), raw[j], x);
      slope = Loss::slope(call, x);
    }
    for (int part = 0; part < kParts<V>; ++part) {
      typename Loss::template Item<f64v> item;
      item.max = to_double(m, part);
      item.target_logit = Loss::kHasIndex ? to_double(logit, part) : f64v{};
      item.target_term = Loss::kHasIndex ? to_double(term, part) : splat<f64v>(1.0);
      item.target_weight = to_double(weight, part);
      item.target_slope = to_double(slope, part);
      item.scale = scale[part] = load<f64v>(lane.scale + part * lanes<f64v>);
      for (int k = 0; k < 3; ++k) item.sums[k] = to_double(s.of[k], part);
      if constexpr (Loss::kHasCoefficients) item.sums[Loss::kDistance] = s.distance[part];
      const f64v log_s = Loss::log_sum(item);
      const auto factors = Loss::factors(call, item, log_s);
      loss[part] = Loss::loss(call, item, log_s) * to_double(load<V>(lane.sample_weight), part);
      factor[part] = factors.all;
      target_gradient[part] = factors.target;
    }
    store(losses, select(ignored != zero, zero,
                         canonical(select(bad, not_a_number, from_double<V>(loss)))));

    if (want_gradient) {
      const V f = from_double<V>(factor), k = from_double<V>(scale),
              at_target = from_double<V>(target_gradient);
      for (int64_t j = 0; j < args.columns; ++j) {
        V e = tile[j];
        if constexpr (Loss::kHasSoftcap) e = Loss::term(e - m);
        V slope = V{};
        if constexpr (Loss::kHasSoftcap) slope = Loss::slope(call, raw[j]);
        V g = Loss::gradient(e, slope, Loss::kHasCoefficients ? probabilities[j] : zero, f, k);
        g = select(apart == splat<V>((T)j), at_target, g);
        tile[j] = select(ignored != zero, zero, select(bad, not_a_number, g));
      }
    }
    return ignored;
  }
};

template <class Loss, class In, class Out, bool kAccumulate>
void short_rows(const RowArgs& args) {
  typedef Compute<In> T;
  typedef Vector<T> V;
  constexpr int kLanes = lanes<V>;
  auto body = [&args](int64_t begin, int64_t end, int thread) {
    const ShortRows<Loss, T> rows(
        args, args.scratch + thread * row_scratch_bytes(args.columns, sizeof(T)));
    for (int64_t i = begin; i < end;) {
      // Tiles do not cross from one outer index to the next where that keeps neighbours together.
      int count = end - i < kLanes ? (int)(end - i) : kLanes;
      const int64_t left = args.inner_size - i % args.inner_size;
      if (args.inner_size >= kLanes && left < count) count = (int)left;

      read_tile(rows.tile, (const In*)args.input, TilePlace<V>(args, i, count, args.input_strides),
                args.columns, args.input_strides.column);
      if (!Loss::kHasIndex)
        read_tile(rows.probabilities, (const In*)args.target,
                  TilePlace<V>(args, i, count, args.target_strides), args.columns,
                  args.target_strides.column);
      T losses[kLanes];
      const V ignored = rows.items(i, count, args.grad != nullptr, losses);
      if (args.grad)
        write_tile<kAccumulate>((Out*)args.grad, rows.tile,
                                TilePlace<V>(args, i, count, args.grad_strides), args.columns,
                                args.grad_strides.column, ignored);
      if (args.losses)
        for (int l = 0; l < count; ++l) ((T*)args.losses)[i + l] = losses[l];
      if constexpr (sizeof(T) == 4)
        if (args.totals) add_few(args.totals[thread], losses, count);
      i += count;
    }
    if (args.totals) normalise(args.totals[thread]);
  };
  const int64_t grain = (kElementsPerTask / (args.columns + 1) / kLanes + 1) * kLanes;
  parallel_for(args.items, grain, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
