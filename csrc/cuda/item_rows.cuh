#pragma once
// Row losses with an item a thread: for rows too short for a team of threads, and for layouts such
// as (N, C, H, W), where neighbouring items, not columns, are neighbours in memory. At most one
// block of columns. Each pass reads the row anew; the second and third find it in the cache.
#include "cuda/row_launch.cuh"

namespace mbk::MBK_ISA {

inline constexpr int kItemThreads = 128;

// The sum of value(k), k < kGroup, joined by halves (k with k + 32, then k + 16, ...): the numbers
// come in the order of their bits reversed, so that six partial sums are enough. From `count` on
// they are 0.
template <class Sums, class Value>
MBK_DEVICE Sums join_lanes_of(int count, Value value) {
  Sums level[6], sum;
#pragma unroll 1
  for (int i = 0; i < kGroup; ++i) {
    const int k =
        (i & 1) << 5 | (i & 2) << 3 | (i & 4) << 1 | (i & 8) >> 1 | (i & 16) >> 3 | i >> 5;
    sum = Sums{};
    if (k < count) sum = value(k);
    bool joined = true;
#pragma unroll
    for (int l = 0; l < 6; ++l) {
      const bool full = i >> l & 1;
      if (joined && full) sum = level[l] + sum;
      if (joined && !full) level[l] = sum;
      joined = joined && full;
    }
  }
  return sum;
}

template <class Loss, class In>
struct ItemRows {
  typedef Compute<In> T;
  typedef typename Loss::template Call<T> Call;
  typedef typename Loss::template Item<double> Item;
  typedef typename Pick<Loss::kWideDistance, double, T>::type Distance;

  struct Sums {
    T rest = 0, coefficients = 0;
    Distance distance = 0;
    MBK_DEVICE Sums operator+(const Sums& other) const {
      Sums s;
      s.rest = rest + other.rest;
      s.coefficients = coefficients + other.coefficients;
      s.distance = distance + other.distance;
      return s;
    }
  };

  const RowLaunch& p;
  const RowArgs& a;
  const Call call;
  const ItemScale<T> item_scale;

  MBK_DEVICE ItemRows(const RowLaunch& launch, double divisor)
      : p(launch), a(launch.args), call(a), item_scale(a, divisor) {}

  MBK_DEVICE T raw(const In* row, int j) const { return (T)widen(row[j * a.input_strides.column]); }
  MBK_DEVICE T logit(const In* row, int j) const { return Loss::logit(call, raw(row, j)); }
  MBK_DEVICE T coefficient(const In* probabilities, int j) const {
    if constexpr (!Loss::kHasCoefficients) return 0;
    const T weight = a.class_weight ? ((const T*)a.class_weight)[j] : (T)1;
    T share = 0;
    if constexpr (!Loss::kHasIndex) share = (T)widen(probabilities[j * a.target_strides.column]);
    return Loss::coefficient(call, weight, share);
  }

  MBK_DEVICE Sums sums(const In* row, const In* probabilities, T m, int apart) const {
    const int columns = (int)a.columns;
    return join_lanes_of<Sums>(columns, [&](int k) {
      Sums s;
      for (int j = k; j < columns; j += kGroup) {
        const T d = logit(row, j) - m, e = Loss::term(d);
        s.rest = s.rest + (j == apart ? (T)0 : e);
        if constexpr (Loss::kHasCoefficients) {
          const T q = coefficient(probabilities, j);
          const Distance away = Loss::kWideDistance ? (Distance)logit(row, j) - (Distance)m : d;
          s.distance = Loss::add_distance(away, (Distance)q, s.distance);
          s.coefficients = s.coefficients + (!Loss::kHasIndex && j == apart ? (T)0 : q);
        }
      }
      return s;
    });
  }

  // The loss of item i, and its gradient.
  MBK_DEVICE T row(int64_t i) const {
    const ItemPosition at(a, i);
    const int columns = (int)a.columns;
    const In* const x = (const In*)a.input + at.offset(a.input_strides);
    const In* const probabilities =
        Loss::kHasIndex ? nullptr : (const In*)a.target + at.offset(a.target_strides);
    int64_t target;
    ItemKind kind = describe_item<Loss>(a, at, target);
    if (kind == ItemKind::bad && !a.from_state) note_bad_target(p, i, target);

    Item item;
    item.target_weight = item.target_slope = 1;
    T m = 0, target_logit = 0;
    int apart = -1;
    for (double& s : item.sums) s = 0;
    if (kind == ItemKind::plain) {
      if (a.from_state) {
        m = *row_state<T>(a, i, 0);
      } else {
        m = -(T)__builtin_inff();
        for (int j = 0; j < columns; ++j) m = max_or_nan(m, logit(x, j));
        m = m + 0;
      }
      if (!(abs(m) < (T)__builtin_inff())) kind = ItemKind::bad;
    }
    if (kind == ItemKind::plain) {
      if constexpr (Loss::kHasIndex) {
        apart = (int)target;
        target_logit = logit(x, apart);
        if (a.class_weight) item.target_weight = (double)((const T*)a.class_weight)[target];
      } else {
        for (int j = columns - 1; j >= 0; --j)
          if (logit(x, j) == m) apart = j;
        if (apart >= 0) item.target_weight = (double)coefficient(probabilities, apart);
      }
      if constexpr (Loss::kHasSoftcap)
        if (apart >= 0) item.target_slope = (double)Loss::slope(call, raw(x, apart));
      if (a.from_state) {
        item.sums[Loss::kRest] = (double)*row_state<T>(a, i, 1);
        if (Loss::kSums > 2) item.sums[2] = (double)*row_state<T>(a, i, 2);
      } else {
        const Sums s = sums(x, probabilities, m, apart);
        item.sums[Loss::kRest] = (double)s.rest;
        if (Loss::kSums > 1) item.sums[Loss::kDistance] = (double)s.distance;
        if (Loss::kSums > 2) item.sums[Loss::kCoefficients] = (double)s.coefficients;
      }
    }
    item.max = (double)m;
    item.target_logit = (double)target_logit;
    item.target_term = Loss::kHasIndex ? (double)Loss::term(target_logit - m) : 1;
    item.scale = item_scale(a, at);
    if (!a.from_state) save_state<Loss, T>(a, i, item, kind);
    if (a.grad) {
      const int64_t offset = at.offset(a.grad_strides);
      if (a.accumulate)
        write_gradient((T*)a.grad + offset, true, x, probabilities, m, apart, item, kind);
      else
        write_gradient((In*)a.grad + offset, false, x, probabilities, m, apart, item, kind);
    }
    if (a.from_state) return 0;
    const double weight = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
    return item_loss<Loss, T>(call, item, weight, kind);
  }

  template <class S>
  MBK_DEVICE void write_gradient(S* grad, bool accumulate, const In* row, const In* probabilities,
                                 T m, int apart, const Item& item, ItemKind kind) const {
    if (kind == ItemKind::ignored && accumulate) return;
    const auto factors = Loss::factors(call, item, call.z_loss != 0 ? Loss::log_sum(item) : 0.0);
    const T factor = (T)factors.all, scale = (T)item.scale;
    for (int j = 0; j < (int)a.columns; ++j) {
      S& to = grad[j * a.grad_strides.column];
      T g = kind == ItemKind::bad ? (T)__builtin_nanf("") : (T)0;
      if (kind == ItemKind::plain) {
        const T x = raw(row, j), c = Loss::logit(call, x);
        const T slope = Loss::kHasSoftcap ? Loss::slope(call, x) : (T)0;
        g = Loss::gradient(Loss::term(c - m), slope, coefficient(probabilities, j), factor, scale);
        if (j == apart) g = (T)factors.target;
      }
      if (accumulate) g = (T)widen(to) + g;
      to = narrow<S>(canonical(g));
    }
  }
};

template <class Loss, class In>
__global__ void __launch_bounds__(kItemThreads, 4) item_rows(const __grid_constant__ RowLaunch p) {
  typedef Compute<In> T;
  struct Shared {
    ExactSumState total;
    double divisor;
    int is_last;
  };
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) clear(shared.total);
  __syncthreads();
  const double divisor = divisor_of_rows(p, shared.total);
  if (threadIdx.x == 0) shared.divisor = divisor;
  __syncthreads();
  const ItemRows<Loss, In> rows(p, shared.divisor);
  ThreadSum sum;
  for (int64_t i = (int64_t)blockIdx.x * kItemThreads + threadIdx.x; i < p.args.items;
       i += (int64_t)gridDim.x * kItemThreads) {
    const T loss = rows.row(i);
    if (p.args.from_state) continue;
    if (p.args.losses) ((T*)p.args.losses)[i] = loss;
    if (sizeof(T) == 4 && p.totals) sum.add((float)loss, shared.total);
  }
  if (p.args.from_state) return;
  sum.flush_warp(shared.total);
  __syncthreads();
  finish_rows(p, shared.divisor, shared.total, &shared.is_last);
}

}  // namespace mbk::MBK_ISA
