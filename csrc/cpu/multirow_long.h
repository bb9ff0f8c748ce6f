#pragma once
// Losses of several rows an item with the lanes along the rows: the maxima, up to two levels of
// sums, the gradient, each a pass over rows that stay in cache.
#include "core/exact_sum.h"
#include "core/multirow_items.h"
#include "core/row_items.h"
#include "cpu/copy_few.h"
#include "cpu/multirow_row.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class T>
struct Rows {
  typedef Vector<T> V;
  typedef typename Pick<Loss::kWide, f64v, V>::type W;  // what is added up
  static constexpr int kWideParts = Loss::kWide ? kParts<V> : 1;
  // Sums that a pass of the level has room for.
  static constexpr int terms(int level) {
    return sums_of<Loss>(level) > 0 ? sums_of<Loss>(level) : 1;
  }
  static constexpr bool kList = Loss::kTarget == ItemTarget::list;

  const MultirowArgs& a;
  const ItemScale<T> item_scale;
  T* const kept[kMaxRows];
  RowOf<T> x[Loss::kInputs], grad[Loss::kGradients];
  bool streams[Loss::kGradients];  // it goes past the caches
  alignas(64) T x_block[Loss::kInputs][kBlock], x_tail[Loss::kInputs][kGroup];
  alignas(64) T grad_block[Loss::kGradients][kBlock], grad_tail[Loss::kGradients][kGroup];
  alignas(64) T weight_tail[kGroup];

  MBK_FN Rows(const MultirowArgs& args, T* scratch, int64_t padded)
      : a(args), item_scale(args), kept{scratch, scratch + padded, scratch + 2 * padded} {
    const int64_t size = (int64_t)sizeof(T), bytes = a.items * a.columns * size;
    for (int i = 0; i < Loss::kGradients; ++i)
      streams[i] = !Loss::kApart && a.inner_size == 1 &&
                   streams_past_caches<V>(a.grads[i].data, a.inputs[i].data, bytes,
                                          a.grads[i].strides.outer * size);
    for (T(&row)[kGroup] : x_tail)
      for (T& v : row) v = 0;
    for (T(&row)[kGroup] : grad_tail)
      for (T& v : row) v = 0;
    for (T(&row)[kBlock] : x_block)
      for (T& v : row) v = 0;
    for (T& v : weight_tail) v = 0;
    if (Loss::kColumnWeights && a.class_weight) {
      const int64_t tail = a.columns / kGroup * kGroup;
      for (int64_t j = tail; j < a.columns; ++j)
        weight_tail[j - tail] = ((const T*)a.class_weight)[j];
    }
  }

  // One block of all rows. Its last, partial group lies in memory of whole groups.
  struct Block {
    const T *main[Loss::kInputs], *tail[Loss::kInputs], *weight;
    const T *ahead[Loss::kInputs], *grad_ahead[Loss::kGradients];
    T *kept[kMaxKept], *grad[Loss::kGradients], *grad_tail[Loss::kGradients];
    int64_t begin, columns;
    bool streams[Loss::kGradients];
    int full, rest;  // whole groups, and columns of the partial one
    int apart;       // the column that is kept out, or -1
    int stop[2];     // where a group with a mask follows: that of `apart`, the partial one
    int plain;       // columns of the partial one that fill vectors, without `apart`: no mask
  };

  MBK_FN Block open(int64_t begin, int64_t apart, bool gradients) {
    Block b;
    b.begin = begin;
    b.columns = a.columns - begin < kBlock ? a.columns - begin : kBlock;
    b.full = (int)(b.columns / kGroup), b.rest = (int)(b.columns % kGroup);
    b.apart = apart >= begin && apart < begin + b.columns ? (int)(apart - begin) : -1;
    b.stop[0] = b.apart >= 0 && b.apart / kGroup < b.full ? b.apart / kGroup : -1;
    b.stop[1] = b.full;
    b.plain = b.apart >= b.full * kGroup ? 0 : b.rest / lanes<V> * lanes<V>;
    b.weight = Loss::kColumnWeights && a.class_weight ? (const T*)a.class_weight + begin : nullptr;
    for (int k = 0; k < kMaxKept; ++k) b.kept[k] = kept[k] + begin;
    for (int i = 0; i < Loss::kInputs; ++i) {
      b.ahead[i] = nullptr;
      if (x[i].direct) {
        if (x[i].ahead) b.ahead[i] = (const T*)x[i].ahead + begin;
        b.main[i] = (const T*)x[i].data + begin;
        b.tail[i] = x_tail[i];
        if (b.rest && !x[i].has_tail) {
          copy_few(x_tail[i], b.main[i] + b.full * kGroup, b.rest);
          x[i].has_tail = true;
        }
      } else {
        b.main[i] = x_block[i];
        b.tail[i] = x_block[i] + b.full * kGroup;
        if (x[i].loaded != begin) {
          x[i].read(x_block[i], begin, b.columns);
          x[i].fetch_block(begin, b.columns);
        }
        x[i].loaded = begin;
      }
    }
    for (int i = 0; i < Loss::kGradients; ++i) {
      b.grad[i] = b.grad_tail[i] = nullptr;
      b.streams[i] = false;
      b.grad_ahead[i] = grad[i].direct && grad[i].ahead ? (const T*)grad[i].ahead + begin : nullptr;
      if (!gradients || !grad[i].data) continue;
      b.grad[i] = grad[i].direct ? (T*)grad[i].data + begin : grad_block[i];
      b.grad_tail[i] = grad[i].direct ? grad_tail[i] : grad_block[i] + b.full * kGroup;
      b.streams[i] = streams[i] && grad[i].direct;
      if (b.streams[i]) b.grad_ahead[i] = nullptr;
    }
    return b;
  }
  MBK_FN void close(const Block& b) const {
    for (int i = 0; i < Loss::kGradients; ++i) {
      if (!b.grad[i]) continue;
      if (grad[i].direct)
        copy_few(b.grad[i] + b.full * kGroup + b.plain, grad_tail[i] + b.plain, b.rest - b.plain);
      if (grad[i].direct) continue;
      grad[i].write(grad_block[i], b.begin, b.columns, a.accumulate);
      grad[i].fetch_block(b.begin, b.columns);
    }
  }

  // A vector of columns: adds its terms, and forms its gradient. kGrads: 0 none, 1 that of the
  // first row only, 2 all that are wanted.
  template <int kLevel, int kGrads, bool kStore, bool kMasked>
  MBK_FN void step(const Block& b, const Constants& c, int group, int k,
                   W (&sum)[terms(kLevel)][kWideParts]) const {
    const bool in_tail = kMasked && group == b.full;
    const int column = group * kGroup + k;
    V v[Loss::kInputs], w = splat<V>(1), stored[kMaxKept] = {};
    for (int i = 0; i < Loss::kInputs; ++i) {
      v[i] = load<V>(in_tail ? b.tail[i] + k : b.main[i] + column);
      constexpr bool kFetch = lanes<V> > 1 && kLevel == (kList ? 0 : 1);
      if (kFetch && b.ahead[i]) __builtin_prefetch(b.ahead[i] + column, 0, 2);
    }
    if (Loss::kColumnWeights && b.weight)
      w = load<V>(in_tail ? weight_tail + k : b.weight + column);
    if constexpr (Loss::kKept > 0) {
      if (kLevel == 1 && !kList) {
        Loss::keep(c, v, stored);
      } else {
        for (int n = 0; n < Loss::kKept; ++n) stored[n] = load<V>(b.kept[n] + column);
      }
      if constexpr (kStore && !kList)
        for (int n = 0; n < Loss::kKept; ++n) store(b.kept[n] + column, stored[n]);
    }
    V g[kMaxRows];
    f64v parts[kMaxRows][kParts<V>];
    if constexpr (Loss::kWide) {
      for (int part = 0; part < kWideParts; ++part) {
        W x_wide[Loss::kInputs], g_wide[kMaxRows], term[kMaxSums];
        for (int i = 0; i < Loss::kInputs; ++i) x_wide[i] = to_double(v[i], part);
        if constexpr (kLevel > 0) {
          Loss::sums1(c, x_wide, W{}, (const W*)nullptr, term);
          add<kMasked>(b, in_tail, group, k + part * lanes<W>, term, part, sum);
        }
        if constexpr (kGrads > 0 && Loss::kWideGradient) {
          Loss::gradient(c, x_wide, W{}, (const W*)nullptr, g_wide);
          for (int i = 0; i < Loss::kGradients; ++i) parts[i][part] = g_wide[i];
        }
      }
    } else if constexpr (kLevel > 0) {
      V term[kMaxSums];
      if constexpr (kLevel == 1) Loss::sums1(c, v, w, stored, term);
      if constexpr (kLevel == 2) Loss::sums2(c, v, w, stored, term);
      add<kMasked>(b, in_tail, group, k, term, 0, sum);
      if constexpr (kList) store(b.kept[1] + column, stored[1] + term[1]);
    }
    if constexpr (kGrads > 0) {
      if constexpr (Loss::kWideGradient) {
        for (int i = 0; i < Loss::kGradients; ++i) g[i] = from_double<V>(parts[i]);
      } else {
        Loss::gradient(c, v, w, stored, g);
      }
    }
    if constexpr (kGrads > 0) {
      for (int i = 0; i < (kGrads == 1 ? 1 : Loss::kGradients); ++i) {
        if (kGrads == 2 && !b.grad[i]) continue;
        if (lanes<V> > 1 && b.grad_ahead[i]) __builtin_prefetch(b.grad_ahead[i] + column, 0, 2);
        const V value = canonical(g[i]);
        if (!in_tail && b.streams[i])
          stream(b.grad[i] + column, value);
        else
          store(in_tail ? b.grad_tail[i] + k : b.grad[i] + column, value);
      }
    }
  }
  template <bool kMasked, int kTerms>
  MBK_FN static void add(const Block& b, bool in_tail, int group, int k, const W* term, int part,
                         W (&sum)[kTerms][kWideParts]) {
    typedef Element<W> E;
    for (int s = 0; s < kTerms; ++s) {
      W t = term[s];
      if constexpr (kMasked) {
        const W number = lane_numbers<W>(0) + splat<W>((E)k);
        const int apart = b.apart >= 0 && b.apart / kGroup == group ? b.apart % kGroup : -1;
        const auto inside =
            (number < splat<W>((E)(in_tail ? b.rest : kGroup))) & (number != splat<W>((E)apart));
        t = select(inside, t, W{});
      }
      sum[s][part] = sum[s][part] + t;
    }
  }

  // Joins lanes by halves. Of a block of less than a group only the first `filled` vectors were
  // written; those without a column would add 0 to what is never -0.
  template <int kCount, int kVectors>
  MBK_FN static void join_filled(W (&lane)[kCount][kVectors], int filled,
                                 double (&totals)[kMaxSums]) {
    int joined = 1;
    while (joined < filled) joined *= 2;
    for (int s = 0; s < kCount; ++s) {
      for (int k = filled; k < joined; ++k) lane[s][k] = W{};
      for (int half = joined / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) lane[s][k] = lane[s][k] + lane[s][k + half];
      totals[s] += (double)sum_lanes(lane[s][0]);
    }
  }

  // Vectors of a group at a time: four, for rows are read faster in the order of memory. One where
  // maxima have brought several rows into the caches, or where much is computed in fp64; and the
  // sums get half of the registers.
  template <int kLevel>
  static constexpr int vectors_at_once() {
    const int most = lanes<f32v> == 16 ? 16 : 8;
    int n = Loss::kMaxima > 1 || Loss::kWideGradient ? 1 : 4;
    while (n > 1 && kLevel > 0 && n * sums_of<Loss>(kLevel) * kWideParts > most) n /= 2;
    return n;
  }

  // A pass over all rows of the item. kLevel 0: the gradient alone.
  template <int kLevel, int kGrads, bool kStore>
  MBK_PASS void pass(const Constants& constants, int64_t apart, double (&totals)[kMaxSums]) {
    constexpr int kTerms = terms(kLevel);
    const Constants c = constants;
    for (double& total : totals) total = 0;
    for (int64_t begin = 0; begin < a.columns; begin += kBlock) {
      const Block b = open(begin, apart, kGrads > 0);
      constexpr int kVectors = vectors_at_once<kLevel>();
      W lane[kTerms][kGroup / lanes<W>];
      const int end = b.full ? kGroup : b.rest;
      for (int k = 0; k < end; k += kVectors * lanes<V>) {
        W sum[kVectors][kTerms][kWideParts] = {};
        int group = 0;
        for (const int stop : b.stop) {
          for (; group < stop; ++group)
            for (int u = 0; u < kVectors; ++u)
              step<kLevel, kGrads, kStore, false>(b, c, group, k + u * lanes<V>, sum[u]);
          if (stop < 0 || (stop == b.full && k >= b.rest)) continue;
          const int columns = stop == b.full ? b.rest : kGroup;
          const int plain = stop == b.full ? b.plain : 0;
          for (int u = 0; u < kVectors && k + u * lanes<V> < columns; ++u) {
            const int first = k + u * lanes<V>;
            if (first < plain)
              step<kLevel, kGrads, kStore, false>(b, c, group, first, sum[u]);
            else
              step<kLevel, kGrads, kStore, true>(b, c, group, first, sum[u]);
          }
          ++group;
        }
        for (int u = 0; u < kVectors; ++u)
          for (int s = 0; s < kTerms; ++s)
            for (int part = 0; part < kWideParts; ++part)
              lane[s][(k / lanes<V> + u) * kWideParts + part] = sum[u][s][part];
      }
      if constexpr (kLevel > 0) {
        if (b.full && kGroup / lanes<W> <= 8) {
          for (int s = 0; s < kTerms; ++s) totals[s] += (double)sum_lanes(lane[s]);
        } else {
          join_filled(lane, (end + lanes<V> - 1) / lanes<V> * kWideParts, totals);
        }
      }
      if constexpr (kGrads > 0) close(b);
    }
  }

  // The largest number of row i; false if a NaN is among them, or none is finite.
  MBK_PASS bool maximum(int i, double& result) {
    constexpr int kUnroll = kGroup / lanes<V> < 4 ? kGroup / lanes<V> : 4;
    const V low = splat<V>(-(T)__builtin_inff());
    V m[kUnroll];
    Int<V> nan[kUnroll / 2];
    for (V& largest : m) largest = low;
    for (Int<V>& some : nan) some = Int<V>{};
    for (int64_t begin = 0; begin < a.columns; begin += kBlock) {
      const Block b = open(begin, -1, false);
      const int whole = b.full * kGroup;
      for (int j = 0; j < whole; j += kUnroll * lanes<V>)
        for (int k = 0; k < kUnroll; k += 2) {
          const V v = load<V>(b.main[i] + j + k * lanes<V>),
                  w = load<V>(b.main[i] + j + (k + 1) * lanes<V>);
          m[k] = max(v, m[k]), m[k + 1] = max(w, m[k + 1]);
          nan[k / 2] |= either_nan(v, w);
        }
      for (int k = 0; k < b.rest; k += lanes<V>) {
        const V v =
            select(lane_numbers<V>(0) < splat<V>((T)(b.rest - k)), load<V>(b.tail[i] + k), low);
        m[0] = max(v, m[0]);
        nan[0] |= is_nan(v);
      }
    }
    for (int k = 1; k < kUnroll; ++k) m[0] = max(m[0], m[k]);
    for (int k = 1; k < kUnroll / 2; ++k) nan[0] |= nan[k];
    const T largest = max_lanes(m[0]) + 0;  // + 0: a maximum of -0 is that of +0
    result = (double)largest;
    return !any(nan[0]) && abs(largest) < (T)__builtin_inff();
  }

  // One number for every column of a gradient.
  MBK_PASS void fill(int i, T value) {
    RowOf<T>& g = grad[i];
    if (!g.data || (a.accumulate && value == 0)) return;
    if (value == 0 && g.stride == 1) {
      int64_t size = 0;
      with_storage(g.dtype, [&](auto* type) { size = sizeof *type; });
      memset(g.data, 0, (size_t)(a.columns * size));
      return;
    }
    for (T& v : grad_block[i]) v = value;
    for (int64_t begin = 0; begin < a.columns; begin += kBlock)
      g.write(grad_block[i], begin, a.columns - begin < kBlock ? a.columns - begin : kBlock,
              a.accumulate);
  }
  MBK_FN T same_for_all(T value) {
    for (int i = 0; i < Loss::kGradients; ++i) fill(i, value);
    return value;
  }

  template <int kLevel, int kGrads, bool kStore>
  MBK_FN void sums(const Constants& c, int64_t apart, MultirowItem& item) {
    double totals[kMaxSums];
    pass<kLevel, kGrads, kStore>(c, apart, totals);
    for (int s = 0; s < sums_of<Loss>(kLevel); ++s)
      (kLevel == 2 ? item.second : item.first)[s] = totals[s];
  }
  template <int kLevel>
  MBK_FN void sums_and_gradient(bool first_only, const Constants& c, int64_t apart,
                                MultirowItem& item) {
    if constexpr (Loss::kGradients > 1) {
      if (!first_only) return sums<kLevel, 2, false>(c, apart, item);
    }
    (void)first_only;
    sums<kLevel, 1, false>(c, apart, item);
  }

  // A level of sums for each target y, and for every column how often it was in a positive one.
  MBK_FN void list_sums(const ItemPosition& at, Constants& c, MultirowItem& item) {
    const int64_t padded = (a.columns + kGroup - 1) / kGroup * kGroup;
    for (int64_t j = 0; j < padded; ++j) kept[0][j] = kept[1][j] = 0;
    const int64_t list = at.offset(a.target_strides);
    const auto target = [&](int64_t j) {
      return j < a.columns ? read_index(a.target, a.target_type, list + j * a.target_strides.column)
                           : -1;
    };
    for (int64_t j = 0; target(j) >= 0; ++j) kept[0][target(j)] = 1;
    double total = 0;
    for (int64_t j = 0; target(j) >= 0; ++j) {
      const int64_t y = target(j);
      c.value[0] = 1 - (double)x[0].value(y);
      sums<1, 0, false>(c, -1, item);
      total += item.first[0];
      kept[1][y] = kept[1][y] - (T)item.first[1];
    }
    item.first[0] = total;
  }

  // One item: writes its gradients, and returns its loss.
  MBK_FN T item(int64_t i, int64_t next) {
    const ItemPosition at(a, i), after(a, next);
    bool wanted = false, first_only = true;
    for (int k = 0; k < Loss::kInputs; ++k) {
      x[k].open(a.inputs[k], at, true);
      if (next != i) x[k].fetch(a.inputs[k], after);
    }
    for (int k = 0; k < Loss::kGradients; ++k) {
      grad[k].open(a.grads[k], at, !a.accumulate);
      if (next != i && a.grads[k].data != a.inputs[k].data) grad[k].fetch(a.grads[k], after);
      wanted = wanted || grad[k].data;
      first_only = first_only && (grad[k].data != nullptr) == (k == 0);
    }
    int64_t target = -1;
    if (Loss::kTarget == ItemTarget::index && a.target) {
      target = item_target(a, at);
      if (target < 0) return same_for_all(0);
    }
    MultirowItem item{};
    Constants c{};
    item.scale = item_scale(a, at);
    item.target_weight = 1;
    if (Loss::kTarget == ItemTarget::number) {
      RowOf<double> label;
      label.open(a.label, at, false);
      item.label = label.value(0);
    }
    for (int k = 0; k < Loss::kMaxima; ++k)
      if (!maximum(k, item.max[k])) return same_for_all(canonical((T)__builtin_nanf("")));
    T old = 0;
    if constexpr (Loss::kApart) {
      item.target_logit = (double)x[0].value(target);
      if (a.class_weight) item.target_weight = (double)((const T*)a.class_weight)[target];
      if (a.accumulate && grad[0].data) old = grad[0].value(target);
    }
    Loss::begin(a, item, c);
    if constexpr (Loss::kApart && Loss::kKept > 0) {
      const T logit = (T)item.target_logit;
      T term[kMaxKept];
      Loss::keep(c, &logit, term);
      item.target_term = (double)term[0];
    }
    const int64_t apart = Loss::kApart ? target : -1;
    double unused[kMaxSums], at_target = 0;
    const bool fused = Loss::kFusedLevel > 0 && wanted && Loss::can_fuse(a);
    if constexpr (kList) {
      list_sums(at, c, item);
    } else {
      if (Loss::kFusedLevel == 1 && fused) {
        Loss::factors(a, item, c);
        if constexpr (Loss::kFusedLevel == 1) sums_and_gradient<1>(first_only, c, apart, item);
      } else if (Loss::kKept > 0 && (wanted || Loss::kLevels > 1)) {
        sums<1, 0, true>(c, apart, item);
      } else {
        sums<1, 0, false>(c, apart, item);
      }
    }
    if constexpr (Loss::kLevels > 1) {
      Loss::between(a, item, c);
      if (Loss::kFusedLevel == 2 && fused) {
        Loss::factors(a, item, c);
        if constexpr (Loss::kFusedLevel == 2) sums<2, 1, false>(c, apart, item);
      } else {
        sums<2, 0, false>(c, apart, item);
      }
    }
    Loss::finish(a, item);
    if (wanted) {
      at_target = Loss::factors(a, item, c);
      if (!fused) {
        if (Loss::kGradients == 1 || first_only) {
          pass<0, 1, false>(c, apart, unused);
        } else {
          pass<0, 2, false>(c, apart, unused);
        }
      }
      if (Loss::kApart) grad[0].put(target, (T)at_target, a.accumulate, old);
    }
    const double weight = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
    return canonical((T)(Loss::loss(a, item) * weight));
  }
};

template <class Loss, class T>
MBK_HOST_FN void long_items(const MultirowArgs& args, int64_t grain) {
  auto body = [&args](int64_t begin, int64_t end, int thread) {
    const int64_t padded = (args.columns + kGroup - 1) / kGroup * kGroup;
    Rows<Loss, T> rows(
        args, (T*)(args.scratch + thread * multirow_scratch_bytes(args.columns, sizeof(T))),
        padded);
    for (int64_t i = begin; i < end; ++i) {
      const T loss = rows.item(i, i + 1 < end ? i + 1 : i);
      if (args.losses) ((T*)args.losses)[i] = loss;
      if constexpr (sizeof(T) == 4)
        if (args.totals) add(args.totals[thread], loss);
    }
    fence();
    if (args.totals) normalise(args.totals[thread]);
  };
  parallel_for(args.items, grain, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
