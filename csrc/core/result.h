#pragma once
// How the terms of a batch become its loss, on every device.
#include "core/args.h"

namespace mbk {

enum class Reduction : int32_t { none, sum, mean };

struct Result {
  Reduction reduction;
  Scalar denominator;  // of a mean, if has_denominator; else the sum of the items' weights
  bool has_denominator;
  void* loss;  // 0-dim; null: not wanted, or reduction none
  DType loss_dtype;
  ExactSumState* loss_sum;  // receives the items' terms before any division; may be null
};

}  // namespace mbk
