#pragma once
// Losses of several rows an item with the lanes across items, for rows too short to fill vectors
// and for layouts such as (N, C, H, W). The arithmetic of an item is that of multirow_long.h,
// operation by operation, so the bits are the same.
#include "core/exact_sum.h"
#include "core/multirow_items.h"
#include "core/row_items.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class T>
struct ShortItems {
  typedef Vector<T> V;
  typedef typename Pick<Loss::kWide, f64v, V>::type W;  // what is added up
  static constexpr int kLanes = lanes<V>, kWideParts = Loss::kWide ? kParts<V> : 1;
  static constexpr bool kSuited = Loss::kLevels > 0 && Loss::kTarget != ItemTarget::list;

  const MultirowArgs& a;
  const ItemScale<T> item_scale;
  V *x[kMaxRows], *grad[kMaxRows], *kept[kMaxKept];  // a vector of items a column

  MBK_FN ShortItems(const MultirowArgs& args, char* scratch) : a(args), item_scale(args) {
    V* next = (V*)scratch;
    for (int i = 0; i < kMaxRows; ++i) {
      x[i] = next, grad[i] = next + a.columns;
      next += 2 * a.columns;
    }
    for (V*& k : kept) k = next, next += a.columns;
  }

  // What is known of each item.
  struct Lanes {
    int64_t target[kLanes];
    T apart[kLanes];                 // the target as a number of the lane type; columns are few
    T ignored[kLanes], bad[kLanes];  // 1: yes
    double sample_weight[kLanes];
    MultirowItem item[kLanes];
    Constants c[kLanes];
  };

  // The constants of the lanes, in vectors of W or V.
  template <class D>
  struct Shared {
    static constexpr int kCount = kLanes / lanes<D>;
    LaneConstants<D> of[kCount];
    MBK_FN explicit Shared(const Lanes& lane) {
      for (int k = 0; k < Loss::kConstants; ++k)
        for (int part = 0; part < kCount; ++part) {
          Element<D> value[lanes<D>];
          for (int l = 0; l < lanes<D>; ++l)
            value[l] = (Element<D>)lane.c[part * lanes<D> + l].value[k];
          of[part].value[k] = load<D>(value);
        }
    }
  };

  MBK_FN V weight(int64_t j) const {
    return splat<V>(Loss::kColumnWeights && a.class_weight ? ((const T*)a.class_weight)[j] : (T)1);
  }
  MBK_FN static void join(W* sum, int count) {
    for (int half = kGroup / 2; half; half /= 2) {
      for (int k = 0; k + half < count; ++k) sum[k] = sum[k] + sum[k + half];
      if (count > half) count = half;
    }
  }

  // One level of sums, into the items.
  template <int kLevel>
  MBK_PASS void sums(Lanes& lane) const {
    constexpr int kCount = sums_of<Loss>(kLevel);
    const Shared<W> c(lane);
    const V apart = load<V>(lane.apart);
    int used = a.columns < kGroup ? (int)a.columns : kGroup;
    if (used == 0) used = 1;  // the sum of no columns is 0
    W sum[kCount][kWideParts][kGroup];
    for (int s = 0; s < kCount; ++s)
      for (int part = 0; part < kWideParts; ++part)
        for (int k = 0; k < used; ++k) sum[s][part][k] = W{};
    for (int64_t j = 0; j < a.columns; ++j) {
      const int k = (int)(j % kGroup);
      V v[Loss::kInputs], stored[kMaxKept] = {};
      for (int i = 0; i < Loss::kInputs; ++i) v[i] = x[i][j];
      if constexpr (Loss::kWide) {
        for (int part = 0; part < kWideParts; ++part) {
          W wide[Loss::kInputs], term[kMaxSums];
          for (int i = 0; i < Loss::kInputs; ++i) wide[i] = to_double(v[i], part);
          Loss::sums1(c.of[part], wide, W{}, (const W*)nullptr, term);
          for (int s = 0; s < kCount; ++s) sum[s][part][k] = sum[s][part][k] + term[s];
        }
      } else {
        V term[kMaxSums];
        if constexpr (Loss::kKept > 0) {
          if constexpr (kLevel == 1) {
            Loss::keep(c.of[0], v, stored);
            for (int n = 0; n < Loss::kKept; ++n) kept[n][j] = stored[n];
          } else {
            for (int n = 0; n < Loss::kKept; ++n) stored[n] = kept[n][j];
          }
        }
        if constexpr (kLevel == 1)
          Loss::sums1(c.of[0], v, weight(j), stored, term);
        else
          Loss::sums2(c.of[0], v, weight(j), stored, term);
        for (int s = 0; s < kCount; ++s) {
          V t = term[s];
          if constexpr (Loss::kApart) t = select(apart == splat<V>((T)j), V{}, t);
          sum[s][0][k] = sum[s][0][k] + t;
        }
      }
    }
    for (int s = 0; s < kCount; ++s)
      for (int part = 0; part < kWideParts; ++part) {
        join(sum[s][part], used);
        for (int l = 0; l < lanes<W>; ++l) {
          MultirowItem& item = lane.item[part * lanes<W> + l];
          (kLevel == 2 ? item.second : item.first)[s] = (double)get(sum[s][part][0], l);
        }
      }
  }

  MBK_PASS void gradient(const Lanes& lane, const T* at_target, int wanted) const {
    typedef typename Pick<Loss::kWideGradient, W, V>::type G;
    const Shared<G> c(lane);
    const V apart = load<V>(lane.apart), target = load<V>(at_target), zero = V{};
    const V bad = load<V>(lane.bad), ignored = load<V>(lane.ignored);
    const V nan = canonical(splat<V>((T)__builtin_nanf("")));
    for (int64_t j = 0; j < a.columns; ++j) {
      V v[Loss::kInputs], stored[kMaxKept] = {}, g[kMaxRows];
      for (int i = 0; i < Loss::kInputs; ++i) v[i] = x[i][j];
      for (int n = 0; n < Loss::kKept; ++n) stored[n] = kept[n][j];
      if constexpr (Loss::kWideGradient) {
        f64v parts[kMaxRows][kWideParts];
        for (int part = 0; part < kWideParts; ++part) {
          W wide[Loss::kInputs], g_wide[kMaxRows];
          for (int i = 0; i < Loss::kInputs; ++i) wide[i] = to_double(v[i], part);
          Loss::gradient(c.of[part], wide, W{}, (const W*)nullptr, g_wide);
          for (int i = 0; i < Loss::kGradients; ++i) parts[i][part] = g_wide[i];
        }
        for (int i = 0; i < Loss::kGradients; ++i) g[i] = from_double<V>(parts[i]);
      } else {
        Loss::gradient(c.of[0], v, weight(j), stored, g);
      }
      if constexpr (Loss::kApart) g[0] = select(apart == splat<V>((T)j), target, g[0]);
      for (int i = 0; i < Loss::kGradients; ++i) {
        if (i >= wanted || !a.grads[i].data) continue;
        grad[i][j] = select(ignored != zero, zero, select(bad != zero, nan, g[i]));
      }
    }
  }

  // The largest number of row i in each lane; false where a NaN is among them, or none is finite.
  MBK_FN void maximum(int i, Lanes& lane) const {
    const V inf = splat<V>((T)__builtin_inff()), one = splat<V>(1);
    V m = -inf;
    Int<V> nan = Int<V>{};
    for (int64_t j = 0; j < a.columns; ++j) {
      nan |= is_nan(x[i][j]);
      m = max(x[i][j], m);
    }
    m = m + V{};  // a maximum of -0 is that of +0
    V bad = load<V>(lane.bad);
    bad = select(abs(m) < inf, bad, one);
    bad = select(nan != 0, one, bad);
    store(lane.bad, bad);
    for (int l = 0; l < kLanes; ++l) lane.item[l].max[i] = (double)get(m, l);
  }

  MBK_FN void read(int i, const TilePlace<V>& at) const {
    const RowTensor& t = a.inputs[i];
    with_storage(t.dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      if constexpr (sizeof(Compute<S>) == sizeof(T))
        read_tile(x[i], (const S*)t.data, at, a.columns, t.strides.column);
    });
  }
  MBK_FN void write(int i, const TilePlace<V>& at, V ignored) const {
    const RowTensor& t = a.grads[i];
    with_storage(t.dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      if constexpr (sizeof(Compute<S>) == sizeof(T)) {
        if (a.accumulate)
          write_tile<true>((S*)t.data, grad[i], at, a.columns, t.strides.column, ignored);
        else
          write_tile<false>((S*)t.data, grad[i], at, a.columns, t.strides.column, ignored);
      }
    });
  }

  // Items [first, first + count): their gradients are written, their losses go to `losses`.
  MBK_FN void items(int64_t first, int count, T* losses) const {
    Lanes lane{};
    for (int i = 0; i < Loss::kInputs; ++i)
      read(i, TilePlace<V>(a, first, count, a.inputs[i].strides));
    for (int i = 0; i < Loss::kMaxima; ++i) maximum(i, lane);
    ItemPosition at(a, first);
    for (int l = 0; l < kLanes; ++l) {  // lanes without an item repeat the last
      MultirowItem& item = lane.item[l];
      lane.target[l] = -1;
      if (Loss::kTarget == ItemTarget::index && a.target) {
        lane.target[l] = item_target(a, at);
        lane.ignored[l] = lane.target[l] < 0;
      }
      lane.apart[l] = Loss::kApart ? (T)lane.target[l] : (T)-1;
      item.scale = item_scale(a, at);
      item.target_weight = 1;
      lane.sample_weight[l] = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
      if (Loss::kTarget == ItemTarget::number)
        with_storage(a.label.dtype, [&](auto* type) {
          typedef StorageOf<decltype(type)> S;
          item.label = (double)widen(((const S*)a.label.data)[at.offset(a.label.strides)]);
        });
      if (Loss::kApart && lane.target[l] >= 0) {
        item.target_logit = (double)((const T*)(x[0] + lane.target[l]))[l];
        if (a.class_weight) item.target_weight = (double)((const T*)a.class_weight)[lane.target[l]];
      }
      Loss::begin(a, item, lane.c[l]);
      if (l + 1 < count) at.advance(a);
    }
    sums<1>(lane);
    if constexpr (Loss::kApart && Loss::kKept > 0) {
      for (int l = 0; l < kLanes; ++l)
        if (lane.target[l] >= 0)
          lane.item[l].target_term = (double)((const T*)(kept[0] + lane.target[l]))[l];
    }
    if constexpr (Loss::kLevels > 1) {
      for (int l = 0; l < count; ++l) Loss::between(a, lane.item[l], lane.c[l]);
      sums<2>(lane);
    }
    int wanted = 0;  // gradients up to the last that is
    for (int i = 0; i < Loss::kGradients; ++i)
      if (a.grads[i].data) wanted = i + 1;
    T at_target[kLanes] = {};
    for (int l = 0; l < count; ++l) {
      losses[l] = lane.ignored[l] != 0 ? 0 : canonical((T)__builtin_nanf(""));
      if (lane.ignored[l] != 0 || lane.bad[l] != 0) continue;
      Loss::finish(a, lane.item[l]);
      losses[l] = canonical((T)(Loss::loss(a, lane.item[l]) * lane.sample_weight[l]));
      if (wanted) at_target[l] = (T)Loss::factors(a, lane.item[l], lane.c[l]);
    }
    if (!wanted) return;
    gradient(lane, at_target, wanted);
    for (int i = 0; i < wanted; ++i)
      if (a.grads[i].data)
        write(i, TilePlace<V>(a, first, count, a.grads[i].strides), load<V>(lane.ignored));
  }
};

// Whether the lanes of a call go across items. Tiles are of the type that is computed in.
template <class T>
MBK_FN bool items_are_short(const MultirowArgs& a, int inputs, int gradients) {
  const int64_t most = a.inputs[0].strides.column == 1 ? kShortContiguousColumns : kShortColumns;
  bool fits = a.columns <= most;
  for (int i = 0; i < inputs; ++i)
    fits = fits && (sizeof(T) == 8) == (a.inputs[i].dtype == DType::f64);
  for (int i = 0; i < gradients; ++i)
    fits = fits && (!a.grads[i].data || (sizeof(T) == 8) == (a.grads[i].dtype == DType::f64));
  return fits;
}

template <class Loss, class T>
MBK_HOST_FN void short_items(const MultirowArgs& args, int64_t grain) {
  auto body = [&args](int64_t begin, int64_t end, int thread) {
    constexpr int kLanes = lanes<Vector<T>>;
    const ShortItems<Loss, T> rows(
        args, args.scratch + thread * multirow_scratch_bytes(args.columns, sizeof(T)));
    T losses[kLanes];
    for (int64_t i = begin; i < end; i += kLanes) {
      const int count = end - i < kLanes ? (int)(end - i) : kLanes;
      rows.items(i, count, losses);
      for (int l = 0; l < count; ++l) {
        if (args.losses) ((T*)args.losses)[i + l] = losses[l];
        if constexpr (sizeof(T) == 4)
          if (args.totals) add(args.totals[thread], losses[l]);
      }
    }
    if (args.totals) normalise(args.totals[thread]);
  };
  parallel_for(args.items, (grain + 15) / 16 * 16, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
