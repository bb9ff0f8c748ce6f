#pragma once
// Row losses with the lanes along the row: one item at a time, in three passes over a row that
// stays in cache (maximum; terms and sums; gradient), so that each exponential is computed once.
#include "core/exact_bins.h"
#include "core/row_items.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

// A row read in groups of kGroup columns; a last, partial group is read from a padded copy.
template <class S>
struct PaddedRow {
  const S* data;
  int64_t tail;  // first column of the partial group, or past the end
  S padded[kGroup];

  MBK_FN PaddedRow(const S* row, int64_t columns, S fill)
      : data(row), tail(columns / kGroup * kGroup) {
    for (int k = 0; k < kGroup; ++k) padded[k] = fill;
    memcpy(padded, row + tail, (size_t)(columns - tail) * sizeof(S));
  }
  MBK_FN const S* group(int64_t j) const { return j == tail ? padded : data + j; }
};

// Copies a row whose columns are not next to each other.
template <class S>
MBK_PASS void gather(S* to, const S* from, int64_t stride, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j * stride];
}
template <class S>
MBK_PASS void scatter(S* to, int64_t stride, const S* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j * stride] = from[j];
}

template <bool kAccumulate, class S>
MBK_PASS void fill(S* grad, int64_t n, Compute<S> value) {
  typedef Compute<S> T;
  if (kAccumulate && value == 0) return;
  for (int64_t j = 0; j < n; ++j)
    grad[j] = narrow<S>(kAccumulate ? canonical((T)(widen(grad[j]) + value)) : value);
}

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// The rows that come after this one, fetched into the second-level cache while it is computed: the
// input during the sums, memory for a gradient during the gradient. Null: nothing to fetch.
struct NextRows {
  const void *input, *grad;
};
MBK_FN void prefetch(const void* row, int64_t offset, int64_t bytes) {
  if (!row) return;
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch((const char*)row + offset + k, 0, 2);
}

// q_j of the columns of a row, where the loss has them for every class. Padding has q = 0.
template <class Loss, class In>
struct Coefficients {
  typedef Compute<In> T;
  typedef Vector<T> V;
  const T* weight;
  const In* probability;
  int64_t tail;
  T weight_tail[kGroup];
  In probability_tail[kGroup];

  MBK_PASS Coefficients(const RowArgs& a, const In* row)
      : weight((const T*)a.class_weight), probability(row) {
    if constexpr (Loss::kHasCoefficients) {
      tail = a.columns / kGroup * kGroup;
      for (int k = 0; k < kGroup; ++k) {
        const bool inside = tail + k < a.columns;
        weight_tail[k] = !inside ? 0 : weight ? weight[tail + k] : 1;
        if (!Loss::kHasIndex) probability_tail[k] = inside ? row[tail + k] : In{};
      }
    }
  }
  template <class W>
  MBK_FN W at(const typename Loss::template Call<T>& call, int64_t group, int k) const {
    W w, p = W{};
    if (group == tail) {
      w = load<W>(weight_tail + k);
      if constexpr (!Loss::kHasIndex) p = load<W>(probability_tail + k);
    } else {
      w = weight ? load<W>(weight + group + k) : splat<W>(1);
      if constexpr (!Loss::kHasIndex) p = load<W>(probability + group + k);
    }
    return Loss::coefficient(call, w, p);
  }
};

// The first two passes, which know nothing of the gradient.
template <class Loss, class In>
struct RowSums {
  typedef Compute<In> T;
  typedef Vector<T> V;
  typedef typename Loss::template Call<T> Call;
  static constexpr int kLanes = lanes<V>, kUnroll = kGroup / kLanes;

  const RowArgs& args;
  const Call call;
  T* const buffer;  // a row of T, rounded up to whole groups

  MBK_FN RowSums(const RowArgs& a, T* scratch) : args(a), call(a), buffer(scratch) {}

  struct Maximum {
    T value;
    bool nan;
  };

  // Pass 1. With a soft cap, the capped logits go to the buffer.
  MBK_PASS Maximum maximum(const PaddedRow<In>& x) const {
    V m[kUnroll];
    Int<V> nan[kUnroll];
    for (int k = 0; k < kUnroll; ++k) m[k] = splat<V>(-(T)__builtin_inff()), nan[k] = Int<V>{};
    for (int64_t j = 0; j < args.columns; j += kGroup) {
      const In* p = x.group(j);
      for (int k = 0; k < kUnroll; ++k) {
        const V v = Loss::logit(call, load<V>(p + k * kLanes));
        if constexpr (Loss::kHasSoftcap) store(buffer + j + k * kLanes, v);
        m[k] = max(v, m[k]);
        nan[k] |= is_nan(v);
      }
    }
    for (int half = kUnroll / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) {
        m[k] = max(m[k], m[k + half]);
        nan[k] |= nan[k + half];
      }
    return {max_lanes(m[0]) + 0, any(nan[0])};  // + 0: a maximum of -0 is that of +0
  }

  // The sums of the blocks of a row, and their total: exact for fp32, in order for fp64, rounded to
  // T, the precision in which the state is saved for a backward. One block needs no joining.
  template <class E>
  struct Blocks {
    E sum[kFlush + kGroup];
    int64_t count = 0;
    bool moved = false;  // in rows of more than kFlush blocks, to:
    ExactSumState earlier;

    MBK_FN void add(E block) {
      if (count == kFlush) move();
      sum[count++] = block;
    }
    MBK_RARE void move() {
      if constexpr (sizeof(E) == 8) {
        sum[0] = total();
        count = 1;
      } else {
        if (!moved) clear(earlier);
        moved = true;
        add_each(earlier, sum, count);
        count = 0;
      }
    }
    MBK_FN E total() {
      if constexpr (sizeof(E) == 8) {
        E all = sum[0];
        for (int64_t i = 1; i < count; ++i) all = all + sum[i];
        return all;
      } else {
        if (moved) return total_of_all();
        if (count == 1) return sum[0];
        for (int k = 0; k < lanes<f32v>; ++k) sum[count + k] = 0;
        return sum_few(sum, count);
      }
    }
    MBK_RARE E total_of_all() {
      add_each(earlier, sum, count);
      return round_to_float(earlier);
    }
  };

  template <class W, int kCount>
  MBK_FN static Element<W> join(W (&v)[kCount]) {
    for (int half = kCount / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) v[k] = v[k] + v[k + half];
    return sum_lanes(v[0]);
  }

  template <class S>
  MBK_PASS int64_t first_maximum(const PaddedRow<S>& x, T m) const {
    for (int64_t j = 0;; j += kGroup) {
      const S* p = x.group(j);
      Int<V> found = Int<V>{};
      for (int k = 0; k < kUnroll; ++k) found |= load<V>(p + k * kLanes) == m;
      if (!any(found)) continue;
      for (int k = 0; k < kGroup; ++k)
        if ((T)widen(p[k]) == m) return j + k;
    }
  }

  // Pass 2: the sums of the row without the term of the column `apart`, which is returned, and, if
  // wanted, the terms into `terms`.
  template <bool kKeep, class S>
  MBK_PASS T sums(const PaddedRow<S>& x, T m, int64_t apart, const Coefficients<Loss, In>& q,
                  T* terms, T* tail_terms, const NextRows& next, double (&result)[3]) const {
    const int64_t group_apart = apart / kGroup * kGroup;
    T terms_apart[kGroup];
    // Padding is -inf for the terms, but must be at a finite distance for the coefficients' sum.
    T near_tail[kGroup];
    if constexpr (Loss::kHasCoefficients)
      for (int k = 0; k < kGroup; ++k)
        near_tail[k] = x.tail + k < args.columns ? widen(x.padded[k]) : m;

    constexpr int kWide = Loss::kWideDistance ? kParts<V> : 1;  // vectors of distances for one of x
    typedef typename Pick<Loss::kWideDistance, f64v, V>::type W;
    Blocks<T> rest, coefficients;
    Blocks<Element<W>> distances;
    for (int64_t begin = 0; begin < args.columns; begin += kBlock) {
      const int64_t end = begin + kBlock < args.columns ? begin + kBlock : args.columns;
      V sum[kUnroll], coefficient[kUnroll];
      W distance[kUnroll * kWide];
      for (int k = 0; k < kUnroll; ++k) sum[k] = coefficient[k] = V{};
      for (W& d : distance) d = W{};
      const auto add_group = [&](auto has_apart, int64_t j, const S* p, T* to,
                                 bool in_tail) __attribute__((always_inline)) {
        prefetch(next.input, j * (int64_t)sizeof(In), kGroup * sizeof(In));
        for (int k = 0; k < kUnroll; ++k) {
          V e = Loss::term(load<V>(p + k * kLanes) - m);
          if constexpr (Loss::kHasCoefficients) {  // before e, in place, takes the logit's memory
            const V logit = in_tail ? load<V>(near_tail + k * kLanes) : load<V>(p + k * kLanes);
            const V qs = q.template at<V>(call, j, k * kLanes);
            for (int part = 0; part < kWide; ++part) {
              W& d = distance[k * kWide + part];
              if constexpr (Loss::kWideDistance) {
                d = Loss::add_distance(to_double(logit, part) - (double)m, to_double(qs, part), d);
              } else {
                d = Loss::add_distance(logit - m, qs, d);
              }
            }
            coefficient[k] = coefficient[k] + qs;
          }
          if constexpr (kKeep) store(to + k * kLanes, e);
          if constexpr (decltype(has_apart)::value) {
            store(terms_apart + k * kLanes, e);
            e = select(lane_numbers<V>(k * kLanes) == splat<V>((T)(apart - j)), V{}, e);
          }
          sum[k] = sum[k] + e;
        }
      };
      for (int64_t j = begin; j < end;) {
        const bool in_tail = j == x.tail;
        const S* p = in_tail ? x.padded : x.data + j;
        T* to = !kKeep ? nullptr : in_tail ? tail_terms : terms + j;
        if (j == group_apart) {
          add_group(Constant<true>{}, j, p, to, in_tail);
          j += kGroup;
          continue;
        }
        int64_t stop = in_tail || end < x.tail ? end : x.tail;
        if (j < group_apart && group_apart < stop) stop = group_apart;
        for (; j < stop; j += kGroup, p += kGroup) {
          add_group(Constant<false>{}, j, p, to, in_tail);
          if constexpr (kKeep) to += kGroup;
        }
      }
      rest.add(join(sum));
      if constexpr (Loss::kSums > 1) distances.add(join(distance));
      if constexpr (Loss::kSums > 2) coefficients.add(join(coefficient));
    }
    result[Loss::kRest] = (double)rest.total();
    if constexpr (Loss::kSums > 1) result[Loss::kDistance] = (double)distances.total();
    if constexpr (Loss::kSums > 2) result[Loss::kCoefficients] = (double)coefficients.total();
    return terms_apart[apart - group_apart];
  }
};

// The losses of a thread's rows. Their logarithms are taken of a vector of rows at once: a single
// one takes longer than the processor can look ahead into the gradient.
template <class Loss, class T>
struct LossQueue {
  typedef typename Loss::template Item<double> Item;
  static constexpr int kLanes = lanes<f64v>;

  const RowArgs& args;
  const typename Loss::template Call<T>& call;
  ExactSumState* const total;  // null: not wanted
  int count = 0;
  int64_t row[kLanes];
  double sample_weight[kLanes] = {}, max[kLanes] = {}, target_logit[kLanes] = {},
         target_term[kLanes] = {}, target_weight[kLanes] = {}, sums[3][kLanes] = {};

  MBK_FN LossQueue(const RowArgs& a, const typename Loss::template Call<T>& c, ExactSumState* t)
      : args(a), call(c), total(t) {}

  MBK_FN void put(int64_t i, T loss) {
    if (args.losses) ((T*)args.losses)[i] = loss;
    if constexpr (sizeof(T) == 4)
      if (total) add(*total, loss);
  }
  MBK_FN void push(int64_t i, const Item& item, double weight) {
    row[count] = i, sample_weight[count] = weight;
    max[count] = item.max, target_logit[count] = item.target_logit;
    target_term[count] = item.target_term, target_weight[count] = item.target_weight;
    for (int k = 0; k < Loss::kSums; ++k) sums[k][count] = item.sums[k];
    if (++count == kLanes) flush();
  }
  MBK_PASS void flush() {
    typename Loss::template Item<f64v> item;
    item.max = load<f64v>(max), item.target_logit = load<f64v>(target_logit);
    item.target_term = load<f64v>(target_term), item.target_weight = load<f64v>(target_weight);
    for (int k = 0; k < 3; ++k) item.sums[k] = load<f64v>(sums[k]);
    const f64v loss = Loss::loss(call, item, Loss::log_sum(item)) * load<f64v>(sample_weight);
    for (int l = 0; l < count; ++l) put(row[l], canonical((T)get(loss, l)));
    count = 0;
  }
};

template <class Loss, class In, class Out, bool kAccumulate>
struct LongRow : RowSums<Loss, In> {
  typedef RowSums<Loss, In> Base;
  typedef typename Base::T T;
  typedef typename Base::V V;
  using Base::args, Base::buffer, Base::call, Base::kLanes, Base::kUnroll, Base::maximum,
      Base::sums;
  // e_j can wait in the gradient's own memory where that has the right type and nothing to lose.
  static constexpr bool kTermsInGrad = __is_same(Out, T) && !kAccumulate;

  const ItemScale<T> item_scale;

  MBK_FN LongRow(const RowArgs& a, T* scratch) : Base(a, scratch), item_scale(a) {}

  // Pass 3: the gradient, from kept terms or from logits. `tail_from` holds the last, partial
  // group.
  template <bool kKept, class S>
  MBK_PASS void gradient(const S* from, const S* tail_from, T m, T factor, T scale,
                         const Coefficients<Loss, In>& q, Out* grad, const NextRows& next) const {
    gradient_in<V, kKept, false>(from, tail_from, m, factor, scale, q, grad, next);
  }
  // The same, one lane at a time, where a factor is not finite: only then can it make a NaN.
  template <bool kKept, class S>
  MBK_RARE void gradient_of_nan(const S* from, const S* tail_from, T m, T factor, T scale,
                                const Coefficients<Loss, In>& q, Out* grad) const {
    gradient_in<T, kKept, true>(from, tail_from, m, factor, scale, q, grad, NextRows{});
  }
  template <class W, bool kKept, bool kCanonical, class S>
  MBK_FN void gradient_in(const S* from, const S* tail_from, T m, T factor, T scale,
                          const Coefficients<Loss, In>& q, Out* grad, const NextRows& next) const {
    const int64_t tail = args.columns / kGroup * kGroup;
    const size_t tail_bytes = (size_t)(args.columns - tail) * sizeof(Out);
    Out tail_out[kGroup] = {};
    if (kAccumulate) memcpy(tail_out, grad + tail, tail_bytes);
    for (int64_t j = 0; j < args.columns; j += kGroup) {
      const S* p = j == tail ? tail_from : from + j;
      Out* to = j == tail ? tail_out : grad + j;
      if constexpr (!kKept) prefetch(next.input, j * (int64_t)sizeof(In), kGroup * sizeof(In));
      prefetch(next.grad, j * (int64_t)sizeof(Out), kGroup * sizeof(Out));
      for (int k = 0; k < kGroup; k += lanes<W>) {
        W e = load<W>(p + k), capped = e, coefficient = W{};
        if constexpr (!kKept) e = Loss::term(e - m);
        if constexpr (Loss::kHasCoefficients) coefficient = q.template at<W>(call, j, k);
        W g = Loss::gradient(call, e, capped, coefficient, splat<W>(factor), splat<W>(scale));
        if constexpr (kAccumulate) g = load<W>(to + k) + g;
        if constexpr (kAccumulate || kCanonical) g = canonical(g);
        store(to + k, g);
      }
    }
    memcpy(grad + tail, tail_out, tail_bytes);
  }

  MBK_FN T* state(int64_t i, int which) const {
    return (T*)args.row_state + which * args.items + i;
  }
  MBK_FN void save(int64_t i, T m, T rest, T coefficients) const {
    if (!args.row_state || args.from_state) return;
    *state(i, 0) = m;
    *state(i, 1) = rest;
    if (Loss::kSums > 2) *state(i, 2) = coefficients;
  }

  // One item. `row`, `probabilities` and `grad` have unit stride; grad may be null, or the row
  // itself.
  MBK_FN void item(int64_t i, const ItemPosition& at, const In* row, const In* probabilities,
                   Out* grad, const NextRows& next, LossQueue<Loss, T>& losses) const {
    int64_t target = -1;
    if constexpr (Loss::kHasIndex) {
      target = item_target(args, at);
      if (target < 0) {
        if (grad) fill<kAccumulate>(grad, args.columns, (T)0);
        save(i, 0, 0, 0);
        losses.put(i, 0);
        return;
      }
    }
    const PaddedRow<In> x(row, args.columns, narrow<In>(-(T)__builtin_inff()));
    typename Base::Maximum m{0, false};
    if (args.from_state) m.value = *state(i, 0);
    if (!args.from_state || Loss::kHasSoftcap) {
      const auto found = maximum(x);
      if (!args.from_state) m = found;
    }
    // NaN anywhere, +inf, or no finite logit at all: torch's log_softmax is NaN throughout.
    if (m.nan || !(abs(m.value) < (T)__builtin_inff())) {
      const T nan = canonical((T)__builtin_nanf(""));
      save(i, nan, nan, nan);
      if (grad) fill<kAccumulate>(grad, args.columns, nan);
      losses.put(i, nan);
      return;
    }
    const Coefficients<Loss, In> q(args, probabilities);
    if constexpr (Loss::kHasSoftcap) {
      finish(i, at, PaddedRow<T>(buffer, args.columns, -(T)__builtin_inff()), m.value, target, q,
             grad, next, losses);
    } else {
      finish(i, at, x, m.value, target, q, grad, next, losses);
    }
  }

  template <class S>
  MBK_FN void finish(int64_t i, const ItemPosition& at, const PaddedRow<S>& x, T m, int64_t target,
                     const Coefficients<Loss, In>& q, Out* grad, const NextRows& next,
                     LossQueue<Loss, T>& losses) const {
    constexpr bool kKeep = !Loss::kHasSoftcap;
    typename Loss::template Item<double> item;
    item.max = (double)m;
    item.scale = item_scale(args, at);
    item.target_logit = 0;
    item.target_weight = 1;
    int64_t apart = target;  // the column whose term is kept out of the sums
    if constexpr (!Loss::kHasIndex) {
      if (!args.from_state) apart = this->first_maximum(x, m);
    } else {
      item.target_logit = (double)widen(x.data[target]);
      if (args.class_weight) item.target_weight = (double)((const T*)args.class_weight)[target];
    }

    T kept_tail[kGroup];
    T* const terms = kTermsInGrad && grad ? (T*)grad : buffer;
    double sum[3] = {};
    T term = 1;  // of a maximum
    if (args.from_state) {
      if constexpr (Loss::kHasIndex) term = Loss::term((T)widen(x.data[target]) - m);
      sum[Loss::kRest] = (double)*state(i, 1);
      if (Loss::kSums > 2) sum[Loss::kCoefficients] = (double)*state(i, 2);
    } else if (kKeep && grad) {
      term = this->template sums<kKeep>(x, m, apart, q, terms, kept_tail, next, sum);
    } else {
      term = this->template sums<false>(x, m, apart, q, (T*)nullptr, (T*)nullptr, next, sum);
    }
    item.target_term = (double)term;
    for (int k = 0; k < 3; ++k) item.sums[k] = sum[k];
    save(i, m, (T)sum[Loss::kRest], (T)sum[2]);
    if (!args.from_state)
      losses.push(i, item,
                  (double)item_value<T>(args.sample_weight, args.sample_weight_strides, at));

    if (grad) {
      const auto factors = Loss::factors(call, item, call.z_loss != 0 ? Loss::log_sum(item) : 0.0);
      const T factor = (T)factors.all, scale = (T)item.scale;
      T at_target = 0;
      if constexpr (Loss::kHasIndex) at_target = (T)factors.target;
      if (kAccumulate && target >= 0) at_target = (T)widen(grad[target]) + at_target;
      const bool finite = abs(factor) < (T)__builtin_inff() && abs(scale) < (T)__builtin_inff();
      if (!kKeep || args.from_state) {
        if (finite)
          gradient<false>(x.data, x.padded, m, factor, scale, q, grad, next);
        else
          gradient_of_nan<false>(x.data, x.padded, m, factor, scale, q, grad);
      } else {
        if (finite)
          gradient<true>(terms, kept_tail, m, factor, scale, q, grad, next);
        else
          gradient_of_nan<true>(terms, kept_tail, m, factor, scale, q, grad);
      }
      if (target >= 0) grad[target] = narrow<Out>(canonical(at_target));
    }
  }
};

template <class Loss, class In, class Out, bool kAccumulate>
void long_rows(const RowArgs& args) {
  typedef Compute<In> T;
  auto body = [&args](int64_t begin, int64_t end, int thread) {
    const int64_t columns = args.columns, padded = (columns + kGroup - 1) / kGroup * kGroup;
    // Per thread: a row of T, and rows of the input, the gradient and the probabilities if strided.
    T* const buffer = (T*)(args.scratch + thread * row_scratch_bytes(columns, sizeof(T)));
    T* const strided = buffer + padded;
    const LongRow<Loss, In, Out, kAccumulate> row(args, buffer);
    LossQueue<Loss, T> losses(args, row.call, args.totals ? &args.totals[thread] : nullptr);
    for (int64_t i = begin; i < end; ++i) {
      const ItemPosition at(args, i), after(args, i + 1 < end ? i + 1 : i);
      const In* x = (const In*)args.input + at.offset(args.input_strides);
      NextRows next{(const In*)args.input + after.offset(args.input_strides), nullptr};
      const In* probabilities = nullptr;
      Out* grad = args.grad ? (Out*)args.grad + at.offset(args.grad_strides) : nullptr;
      if (args.input_strides.column != 1) {
        gather((In*)strided, x, args.input_strides.column, columns);
        x = (const In*)strided;
        next.input = nullptr;
      }
      if (!Loss::kHasIndex) {
        probabilities = (const In*)args.target + at.offset(args.target_strides);
        if (args.target_strides.column != 1) {
          gather((In*)(strided + padded), probabilities, args.target_strides.column, columns);
          probabilities = (const In*)(strided + padded);
        }
      }
      Out* const to = grad;
      if (grad && args.grad_strides.column != 1) {
        grad = (Out*)(strided + 2 * padded);
        if (kAccumulate) gather(grad, to, args.grad_strides.column, columns);
      }
      if (grad && grad == to && (const void*)to != (const void*)x)
        next.grad = (const Out*)args.grad + after.offset(args.grad_strides);
      row.item(i, at, x, probabilities, grad, next, losses);
      if (grad != to) scatter(to, args.grad_strides.column, grad, columns);
    }
    if (losses.count) losses.flush();
    if (args.totals) normalise(args.totals[thread]);
  };
  const int64_t grain = kElementsPerTask / (args.columns + 1) + 1;
  parallel_for(args.items, grain, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
