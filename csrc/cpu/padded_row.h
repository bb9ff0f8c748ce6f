#pragma once
// One row of logits for the loops of long_rows.h: its groups, its copy, what is fetched ahead.
#include "core/row_items.h"
#include "cpu/copy_few.h"

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
    copy_group(padded, row + tail, columns - tail, fill);
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

}  // namespace
}  // namespace mbk::MBK_ISA
