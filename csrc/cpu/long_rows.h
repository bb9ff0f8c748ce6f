#pragma once
// Row losses with the lanes along the row: one item at a time, in three passes over a row that
// stays in cache (maximum; terms and sums; gradient), so that each exponential is computed once.
#include "core/exact_sum.h"
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

MBK_PASS float rounded(const ExactSumState& s) { return round_to_float(s); }

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
    for (int k = 1; k < kUnroll; ++k) m[0] = max(m[k], m[0]), nan[0] |= nan[k];
    T value = get(m[0], 0);
    for (int k = 1; k < kLanes; ++k) value = max(get(m[0], k), value);
    return {value + 0, any(nan[0])};  // + 0: a maximum of -0 is that of +0
  }

  // Joins the blocks of a row: exactly, or in order for fp64. One block needs no joining.
  struct BlockSum {
    ExactSumState exact;
    T single = 0;
    MBK_FN void add(T block, int64_t index, int64_t columns) {
      if constexpr (sizeof(T) == 8) {
        single = index ? single + block : block;
      } else if (columns <= kBlock) {
        single = block;
      } else {
        if (!index) clear(exact);
        mbk::MBK_ISA::add(exact, block);
      }
    }
    // Rounded to T, the precision in which the state is saved for a backward.
    MBK_FN T total(int64_t columns) const {
      if constexpr (sizeof(T) == 8) {
        return single;
      } else {
        return columns <= kBlock ? single : rounded(exact);
      }
    }
  };

  MBK_FN static T join(V (&v)[kUnroll]) {
    for (int half = kUnroll / 2; half; half /= 2)
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

  // Pass 2: the sums of the row without the term of `target`, and, if wanted, the terms into
  // `terms`.
  template <bool kKeep, class S>
  MBK_PASS void sums(const PaddedRow<S>& x, T m, int64_t target, const Coefficients<Loss, In>& q,
                     T* terms, T* tail_terms, const NextRows& next, T (&result)[3]) const {
    // The group of the target, with its logit replaced so that its term is 0.
    S patch[kGroup];
    const int64_t patched = target < 0 ? -1 : target / kGroup * kGroup;
    if (target >= 0) {
      memcpy(patch, x.group(patched), sizeof patch);
      patch[target - patched] = narrow<S>(-(T)__builtin_inff());
    }
    // Padding is -inf for the terms, but must be at a finite distance for the coefficients' sum.
    T near_tail[kGroup];
    if constexpr (Loss::kHasCoefficients)
      for (int k = 0; k < kGroup; ++k)
        near_tail[k] = x.tail + k < args.columns ? widen(x.padded[k]) : m;

    BlockSum total[Loss::kSums];
    for (int64_t begin = 0, index = 0; begin < args.columns; begin += kBlock, ++index) {
      const int64_t end = begin + kBlock < args.columns ? begin + kBlock : args.columns;
      V sum[kUnroll], distance[kUnroll], coefficient[kUnroll];
      for (int k = 0; k < kUnroll; ++k) sum[k] = distance[k] = coefficient[k] = V{};
      for (int64_t j = begin; j < end; j += kGroup) {
        const S* p = j == patched ? patch : x.group(j);
        T* const to = !kKeep ? nullptr : j == x.tail ? tail_terms : terms + j;
        prefetch(next.input, j * (int64_t)sizeof(In), kGroup * sizeof(In));
        for (int k = 0; k < kUnroll; ++k) {
          const V e = Loss::term(load<V>(p + k * kLanes) - m);
          sum[k] = sum[k] + e;
          if constexpr (Loss::kHasCoefficients) {  // before e, in place, takes the logit's memory
            const V logit =
                j == x.tail ? load<V>(near_tail + k * kLanes) : load<V>(x.data + j + k * kLanes);
            Loss::add_coefficient(logit - m, q.template at<V>(call, j, k * kLanes), distance[k],
                                  coefficient[k]);
          }
          if constexpr (kKeep) store(to + k * kLanes, e);
        }
      }
      total[Loss::kRest].add(join(sum), index, args.columns);
      if constexpr (Loss::kSums > 1)
        total[Loss::kDistance].add(join(distance), index, args.columns);
      if constexpr (Loss::kSums > 2)
        total[Loss::kCoefficients].add(join(coefficient), index, args.columns);
    }
    for (int k = 0; k < Loss::kSums; ++k) result[k] = total[k].total(args.columns);
  }
};

// The end of a row.
template <class Loss, class T>
MBK_PASS typename Loss::template Result<double> finish_row(
    const typename Loss::template Call<T>& call, const typename Loss::template Item<double>& item) {
  return Loss::template finish<double>(call, item);
}

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
        if constexpr (kCanonical) g = canonical(g);
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

  // One item; returns its loss. `row`, `probabilities` and `grad` have unit stride; grad may be
  // null, or the row itself.
  MBK_FN T item(int64_t i, const ItemPosition& at, const In* row, const In* probabilities,
                Out* grad, const NextRows& next) const {
    int64_t target = -1;
    if constexpr (Loss::kHasIndex) {
      target = item_target(args, at);
      if (target < 0) {
        if (grad) fill<kAccumulate>(grad, args.columns, (T)0);
        save(i, 0, 0, 0);
        return 0;
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
      return nan;
    }
    const Coefficients<Loss, In> q(args, probabilities);
    if constexpr (Loss::kHasSoftcap) {
      return finish(i, at, PaddedRow<T>(buffer, args.columns, -(T)__builtin_inff()), m.value,
                    target, q, grad, next);
    } else {
      return finish(i, at, x, m.value, target, q, grad, next);
    }
  }

  template <class S>
  MBK_FN T finish(int64_t i, const ItemPosition& at, const PaddedRow<S>& x, T m, int64_t target,
                  const Coefficients<Loss, In>& q, Out* grad, const NextRows& next) const {
    constexpr bool kKeep = !Loss::kHasSoftcap;
    typename Loss::template Item<double> item;
    const double sample_weight =
        (double)item_value<T>(args.sample_weight, args.sample_weight_strides, at);
    item.max = (double)m;
    item.scale = item_scale(args, at);
    item.target_logit = 0;
    item.target_weight = item.target_term = 1;
    int64_t apart = target;  // the column whose term is kept out of the sums
    if constexpr (!Loss::kHasIndex) {
      if (!args.from_state) apart = this->first_maximum(x, m);
    } else {
      const T logit = widen(x.data[target]);
      item.target_logit = (double)logit;
      item.target_term = (double)Loss::term(logit - m);
      if (args.class_weight) item.target_weight = (double)((const T*)args.class_weight)[target];
    }

    T kept_tail[kGroup];
    T* const terms = kTermsInGrad && grad ? (T*)grad : buffer;
    T sum[3] = {};
    if (args.from_state) {
      sum[Loss::kRest] = *state(i, 1);
      if (Loss::kSums > 2) sum[Loss::kCoefficients] = *state(i, 2);
    } else if (kKeep && grad) {
      this->template sums<kKeep>(x, m, apart, q, terms, kept_tail, next, sum);
      if (!Loss::kHasIndex) (apart >= x.tail ? kept_tail[apart - x.tail] : terms[apart]) = 1;
    } else {
      this->template sums<false>(x, m, apart, q, (T*)nullptr, (T*)nullptr, next, sum);
    }
    for (int k = 0; k < 3; ++k) item.sums[k] = (double)sum[k];
    save(i, m, sum[Loss::kRest], sum[2]);
    const auto result = finish_row<Loss>(call, item);

    if (grad) {
      const T factor = (T)result.factor, scale = (T)item.scale;
      T at_target = (T)result.target_gradient;
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
    return canonical((T)(result.loss * sample_weight));
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
      const T loss = row.item(i, at, x, probabilities, grad, next);
      if (grad != to) scatter(to, args.grad_strides.column, grad, columns);
      if (args.losses) ((T*)args.losses)[i] = loss;
      if constexpr (sizeof(T) == 4)
        if (args.totals) add(args.totals[thread], loss);
    }
    if (args.totals) normalise(args.totals[thread]);
  };
  const int64_t grain = kElementsPerTask / (args.columns + 1) + 1;
  parallel_for(args.items, grain, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
