#pragma once
// From the terms of a batch to its loss: how the result of a call is reduced, and its one rounding.
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "core/result.h"

namespace mbk {

// One accumulator a thread; one thread's needs no allocation.
class ThreadTotals {
 public:
  explicit ThreadTotals(int threads) : more_(threads > 1 ? static_cast<size_t>(threads) : 0) {}
  ExactSumState* data() { return more_.empty() ? &one_ : more_.data(); }
  ExactSumState merged() const;

 private:
  ExactSumState one_{};
  std::vector<ExactSumState> more_;
};

double exact_value(const ExactSumState& s);  // rounded to nearest even
void exact_merge(ExactSumState& into, ExactSumState from);
void exact_add(ExactSumState& s, const float* values, int64_t n);

double read_scalar(const Scalar& s);
double divisor_of(const Result& r, double weights);

// loss = total / divisor (mean) or total (sum), rounded once to its dtype where the total is exact.
void store_result(const Result& r, ExactSumState total, double divisor);
void store_result(const Result& r, double total, double divisor);

}  // namespace mbk
