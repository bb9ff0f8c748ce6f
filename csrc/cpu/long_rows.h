#pragma once
// Row losses with the lanes along the row: one item at a time, in three passes over a row that
// stays in cache (maximum; terms and sums; gradient), so that each exponential is computed once.
#include "core/row_items.h"
#include "cpu/padded_row.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"

namespace mbk::MBK_ISA {
namespace {

// The losses of a thread's rows. The logarithms and the exact sum of kRows are formed at once: of a
// single row they take longer than the processor can look ahead into the gradient.
template <class Loss, class T>
struct LossQueue {
  typedef Vector<T> V;
  static constexpr int kRows = 32;

  const RowArgs& args;
  const typename Loss::template Call<T>& call;
  ExactSumState* const total;  // null: not wanted
  int count = 0;
  int64_t row[kRows];
  double sample_weight[kRows] = {}, max[kRows] = {}, target_logit[kRows] = {},
         target_term[kRows] = {}, target_weight[kRows] = {}, sums[3][kRows] = {};

  MBK_FN LossQueue(const RowArgs& a, const typename Loss::template Call<T>& c, ExactSumState* t)
      : args(a), call(c), total(t) {}

  MBK_FN void put(int64_t i, T loss) {
    if (args.losses) ((T*)args.losses)[i] = loss;
    if constexpr (sizeof(T) == 4)
      if (total) add(*total, loss);
  }
  MBK_FN void push(int64_t i, const typename Loss::template Item<double>& item, double weight) {
    row[count] = i, sample_weight[count] = weight;
    max[count] = item.max, target_logit[count] = item.target_logit;
    target_term[count] = item.target_term, target_weight[count] = item.target_weight;
    for (int k = 0; k < Loss::kSums; ++k) sums[k][count] = item.sums[k];
    if (++count == kRows) flush();
  }
  MBK_FN f64v losses_from(int first) const {
    typename Loss::template Item<f64v> item;
    item.max = load<f64v>(max + first), item.target_logit = load<f64v>(target_logit + first);
    item.target_term = load<f64v>(target_term + first);
    item.target_weight = load<f64v>(target_weight + first);
    for (int k = 0; k < 3; ++k) item.sums[k] = load<f64v>(sums[k] + first);
    return Loss::loss(call, item, Loss::log_sum(item)) * load<f64v>(sample_weight + first);
  }
  MBK_PASS void flush() {
    T loss[kRows];
    for (int first = 0; first < count; first += lanes<V>) {
      f64v parts[kParts<V>];
      for (int part = 0; part < kParts<V>; ++part)
        parts[part] = losses_from(first + part * lanes<f64v>);
      store(loss + first, canonical(from_double<V>(parts)));
    }
    if (args.losses)
      for (int k = 0; k < count; ++k) ((T*)args.losses)[row[k]] = loss[k];
    if constexpr (sizeof(T) == 4)
      if (total) add_few(*total, loss, count);
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
  // group. `raw`: the logits without a soft cap.
  template <bool kKept, class S>
  MBK_PASS void gradient(const S* from, const S* tail_from, const PaddedRow<In>& raw, T m, T factor,
                         T scale, const Coefficients<Loss, In>& q, Out* grad,
                         const NextRows& next) const {
    gradient_in<V, kKept, false>(from, tail_from, raw, m, factor, scale, q, grad, next);
  }
  // The same, one lane at a time, where a factor is not finite: only then can it make a NaN.
  template <bool kKept, class S>
  MBK_RARE void gradient_of_nan(const S* from, const S* tail_from, const PaddedRow<In>& raw, T m,
                                T factor, T scale, const Coefficients<Loss, In>& q,
                                Out* grad) const {
    gradient_in<T, kKept, true>(from, tail_from, raw, m, factor, scale, q, grad, NextRows{});
  }
  template <class W, bool kKept, bool kCanonical, class S>
  MBK_FN void gradient_in(const S* from, const S* tail_from, const PaddedRow<In>& raw, T m,
                          T factor, T scale, const Coefficients<Loss, In>& q, Out* grad,
                          const NextRows& next) const {
    const int64_t tail = args.columns / kGroup * kGroup;
    Out tail_out[kGroup];
    if (kAccumulate) copy_group(tail_out, grad + tail, args.columns - tail, Out{});
    for (int64_t j = 0; j < args.columns; j += kGroup) {
      const S* p = j == tail ? tail_from : from + j;
      Out* to = j == tail ? tail_out : grad + j;
      if constexpr (!kKept) prefetch(next.input, j * (int64_t)sizeof(In), kGroup * sizeof(In));
      prefetch(next.grad, j * (int64_t)sizeof(Out), kGroup * sizeof(Out));
      constexpr int kAtOnce = lanes<W> == 1 ? 1 : Base::kAtOnce;
      for (int first = 0; first < kGroup; first += kAtOnce * lanes<W>) {
        W x[kAtOnce], term[kAtOnce], slope[kAtOnce] = {};
        for (int u = 0; u < kAtOnce; ++u) term[u] = x[u] = load<W>(p + first + u * lanes<W>);
        if constexpr (!kKept) {
          W distance[kAtOnce];
          for (int u = 0; u < kAtOnce; ++u) distance[u] = x[u] - m;
          Loss::terms(distance, term);
        }
        if constexpr (Loss::kHasSoftcap) {
          for (int u = 0; u < kAtOnce; ++u) x[u] = load<W>(raw.group(j) + first + u * lanes<W>);
          Loss::slopes(call, x, slope);
        }
        for (int u = 0; u < kAtOnce; ++u) {
          const int k = first + u * lanes<W>;
          W coefficient = W{};
          if constexpr (Loss::kHasCoefficients) coefficient = q.template at<W>(call, j, k);
          W g = Loss::gradient(term[u], slope[u], coefficient, splat<W>(factor), splat<W>(scale));
          if constexpr (kAccumulate) g = load<W>(to + k) + g;
          if constexpr (kAccumulate || kCanonical) g = canonical(g);
          store(to + k, g);
        }
      }
    }
    copy_few(grad + tail, tail_out, args.columns - tail);
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
      finish(i, at, PaddedRow<T>(buffer, args.columns, -(T)__builtin_inff()), x, m.value, target, q,
             grad, next, losses);
    } else {
      finish(i, at, x, x, m.value, target, q, grad, next, losses);
    }
  }

  template <class S>
  MBK_FN void finish(int64_t i, const ItemPosition& at, const PaddedRow<S>& x,
                     const PaddedRow<In>& raw, T m, int64_t target, const Coefficients<Loss, In>& q,
                     Out* grad, const NextRows& next, LossQueue<Loss, T>& losses) const {
    constexpr bool kKeep = !Loss::kHasSoftcap;
    typename Loss::template Item<double> item;
    item.max = (double)m;
    item.scale = item_scale(args, at);
    item.target_logit = 0;
    item.target_weight = 1;
    if constexpr (!Loss::kHasIndex) {
      target = this->first_maximum(x, m);
      if (target >= 0) {
        const int64_t group = target / kGroup * kGroup;
        item.target_weight = (double)q.template at<T>(call, group, (int)(target - group));
      }
    } else {
      item.target_logit = (double)widen(x.data[target]);
      if (args.class_weight) item.target_weight = (double)((const T*)args.class_weight)[target];
    }
    item.target_slope = 1;
    if constexpr (Loss::kHasSoftcap)
      if (grad && target >= 0)
        item.target_slope = (double)Loss::slope(call, (T)widen(raw.data[target]));

    T kept_tail[kGroup];
    T* const terms = kTermsInGrad && grad ? (T*)grad : buffer;
    double sum[3] = {};
    T term = 1;  // of a maximum
    if (args.from_state) {
      if constexpr (Loss::kHasIndex) term = Loss::term((T)widen(x.data[target]) - m);
      sum[Loss::kRest] = (double)*state(i, 1);
      if (Loss::kSums > 2) sum[Loss::kCoefficients] = (double)*state(i, 2);
    } else if (kKeep && grad) {
      term = this->template sums<kKeep>(x, m, target, q, terms, kept_tail, next, sum);
    } else {
      term = this->template sums<false>(x, m, target, q, (T*)nullptr, (T*)nullptr, next, sum);
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
      T at_target = (T)factors.target;
      if (kAccumulate && target >= 0) at_target = (T)widen(grad[target]) + at_target;
      const bool finite = abs(factor) < (T)__builtin_inff() && abs(scale) < (T)__builtin_inff();
      if (!kKeep || args.from_state) {
        if (finite)
          gradient<false>(x.data, x.padded, raw, m, factor, scale, q, grad, next);
        else
          gradient_of_nan<false>(x.data, x.padded, raw, m, factor, scale, q, grad);
      } else {
        if (finite)
          gradient<true>(terms, kept_tail, raw, m, factor, scale, q, grad, next);
        else
          gradient_of_nan<true>(terms, kept_tail, raw, m, factor, scale, q, grad);
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
