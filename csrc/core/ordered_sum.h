#pragma once
// The sum of fp64 numbers, in one order on every chip: blocks of kPointwiseBlock, in which number i
// belongs to lane i % kGroup; each lane adds its numbers in order, lanes are joined by halves,
// blocks in order.
#include "core/row_items.h"

namespace mbk::MBK_ISA {

template <class Value>
MBK_FN double ordered_sum(int64_t n, Value value) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kPointwiseBlock) {
    const int64_t end = begin + kPointwiseBlock < n ? begin + kPointwiseBlock : n;
    double lane[kGroup] = {};
    for (int64_t i = begin; i < end; ++i) lane[(i - begin) % kGroup] += value(i);
    for (int half = kGroup / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
    total += lane[0];
  }
  return total;
}

}  // namespace mbk::MBK_ISA
