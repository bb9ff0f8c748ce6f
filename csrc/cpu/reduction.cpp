#include "cpu/reduction.h"

#include "core/store_result.h"

namespace mbk {

using namespace mbk::MBK_ISA;

ExactSumState ThreadTotals::merged() const {
  ExactSumState all = one_;
  normalise(all);
  for (const ExactSumState& t : more_) merge(all, t);
  return all;
}

double exact_value(const ExactSumState& s) { return round_exact(s, false); }

void exact_merge(ExactSumState& into, ExactSumState from) {
  normalise(into);
  normalise(from);
  merge(into, from);
}

void exact_add(ExactSumState& s, const float* values, int64_t n) {
  constexpr int64_t kBetweenCarries = int64_t{1} << 30;
  for (int64_t i = 0; i < n; ++i) {
    add(s, values[i]);
    if (i % kBetweenCarries == kBetweenCarries - 1) normalise(s);
  }
  normalise(s);
}

double read_scalar(const Scalar& s) { return read(s); }

double divisor_of(const Result& r, double weights) {
  if (r.reduction != Reduction::mean) return 1;
  return r.has_denominator ? read(r.denominator) : weights;
}

void store_result(const Result& r, ExactSumState total, double divisor) {
  host::store_result(r, total, divisor);
}
void store_result(const Result& r, double total, double divisor) {
  host::store_result(r, total, divisor);
}

}  // namespace mbk
