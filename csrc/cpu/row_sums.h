#pragma once
// The maximum and the sums of one row, for the loops of long_rows.h.
#include "core/exact_bins.h"
#include "core/row_items.h"
#include "cpu/padded_row.h"

namespace mbk::MBK_ISA {
namespace {

// The first two passes, which know nothing of the gradient.
template <class Loss, class In>
struct RowSums {
  typedef Compute<In> T;
  typedef Vector<T> V;
  typedef typename Loss::template Call<T> Call;
  static constexpr int kLanes = lanes<V>, kUnroll = kGroup / kLanes;
  // Terms that are computed before any is stored, so that the steps of one fill the waits of
  // others.
  static constexpr int kAtOnce = kLanes == 16 ? 4 : kLanes == 8 && sizeof(T) == 4 ? 2 : 1;

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
    Int<V> nan[kUnroll / 2];
    for (V& largest : m) largest = splat<V>(-(T)__builtin_inff());
    for (Int<V>& some : nan) some = Int<V>{};
    for (int64_t j = 0; j < args.columns; j += kGroup) {
      const In* p = x.group(j);
      for (int k = 0; k < kUnroll; k += 2) {
        V v[2];
        for (int u = 0; u < 2; ++u) {
          v[u] = Loss::logit(call, load<V>(p + (k + u) * kLanes));
          if constexpr (Loss::kHasSoftcap) store(buffer + j + (k + u) * kLanes, v[u]);
          m[k + u] = max(v[u], m[k + u]);
        }
        nan[k / 2] |= either_nan(v[0], v[1]);
      }
    }
    const V largest =
        join_vectors(m, [](V a, V b) __attribute__((always_inline)) { return max(a, b); });
    const Int<V> some =
        join_vectors(nan, [](Int<V> a, Int<V> b) __attribute__((always_inline)) { return a | b; });
    return {max_lanes(largest) + 0, any(some)};  // + 0: a maximum of -0 is that of +0
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
        E all = count > 0 ? sum[0] : 0;  // always: but GCC cannot know
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

  template <class S>
  MBK_PASS int64_t first_maximum(const PaddedRow<S>& x, T m) const {
    for (int64_t j = 0; j < args.columns; j += kGroup) {
      const S* p = x.group(j);
      Int<V> found = Int<V>{};
      for (int k = 0; k < kUnroll; ++k) found |= load<V>(p + k * kLanes) == m;
      if (!any(found)) continue;
      for (int k = 0; k < kGroup; ++k)
        if ((T)widen(p[k]) == m) return j + k;
    }
    return -1;  // the logits are others than those of the saved maximum
  }

  // Pass 2: the sums of the row without the term of the column `apart`, which is returned, and
  // without its coefficient, and, if wanted, the terms into `terms`.
  template <bool kKeep, class S>
  MBK_PASS T sums(const PaddedRow<S>& x, T m, int64_t apart, const Coefficients<Loss, In>& q,
                  T* terms, T* tail_terms, const NextRows& next, double (&result)[3]) const {
    // The group of `apart`, in a copy where it has no term: in a loop of its own it would end the
    // others' loop where no processor foresees it.
    const int64_t group_apart = apart / kGroup * kGroup;
    S others[kGroup];
    memcpy(others, x.group(group_apart), sizeof others);
    const T term_apart = Loss::term((T)widen(others[apart - group_apart]) - m);
    others[apart - group_apart] = narrow<S>(-(T)__builtin_inff());
    T other_coefficients[kGroup];
    if constexpr (Loss::kSums > 2) {
      for (int k = 0; k < kGroup; k += kLanes)
        store(other_coefficients + k, q.template at<V>(call, group_apart, k));
      other_coefficients[apart - group_apart] = 0;
    }
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
      for (int64_t j = begin; j < end; j += kGroup) {
        const bool in_tail = j == x.tail;
        const S* const logits = in_tail ? x.padded : x.data + j;
        const S* const p = j == group_apart ? others : logits;
        T* const to = !kKeep ? nullptr : in_tail ? tail_terms : terms + j;
        prefetch(next.input, j * (int64_t)sizeof(In), kGroup * sizeof(In));
        for (int first = 0; first < kUnroll; first += kAtOnce) {
          V distance_of[kAtOnce], term[kAtOnce];
          for (int u = 0; u < kAtOnce; ++u) distance_of[u] = load<V>(p + (first + u) * kLanes) - m;
          Loss::terms(distance_of, term);
          for (int k = first; k < first + kAtOnce; ++k) {
            if constexpr (Loss::kHasCoefficients) {  // before a term, in place, takes the memory
              const V logit =
                  in_tail ? load<V>(near_tail + k * kLanes) : load<V>(logits + k * kLanes);
              const V qs = q.template at<V>(call, j, k * kLanes);
              for (int part = 0; part < kWide; ++part) {
                W& d = distance[k * kWide + part];
                if constexpr (Loss::kWideDistance) {
                  d = Loss::add_distance(to_double(logit, part) - (double)m, to_double(qs, part),
                                         d);
                } else {
                  d = Loss::add_distance(logit - m, qs, d);
                }
              }
              coefficient[k] = coefficient[k] + (Loss::kSums > 2 && j == group_apart
                                                     ? load<V>(other_coefficients + k * kLanes)
                                                     : qs);
            }
            if constexpr (kKeep) store(to + k * kLanes, term[k - first]);
            sum[k] = sum[k] + term[k - first];
          }
        }
      }
      rest.add(sum_lanes(sum));
      if constexpr (Loss::kSums > 1) distances.add(sum_lanes(distance));
      if constexpr (Loss::kSums > 2) coefficients.add(sum_lanes(coefficient));
    }
    result[Loss::kRest] = (double)rest.total();
    if constexpr (Loss::kSums > 1) result[Loss::kDistance] = (double)distances.total();
    if constexpr (Loss::kSums > 2) result[Loss::kCoefficients] = (double)coefficients.total();
    return term_apart;
  }
};

}  // namespace
}  // namespace mbk::MBK_ISA
