#include "cpu/reduction.h"

#include "core/dtype.h"
#include "core/exact_sum.h"

namespace mbk {

using namespace mbk::MBK_ISA;

namespace {

// Rounding to odd keeps what a second rounding, to a 16-bit type, must know.
float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  if (back == x || x != x || bits(nearest) & 1) return nearest;
  const bool outward = (back < x) == (x > 0);
  return as_float(static_cast<int32_t>(bits(nearest) + (outward ? 1 : -1)));
}

void store_rounded(const Result& r, double value) {
  value = canonical(value);
  switch (r.loss_dtype) {
    case DType::f32:
      *static_cast<float*>(r.loss) = static_cast<float>(value);
      break;
    case DType::bf16:
      *static_cast<bf16*>(r.loss) = narrow<bf16>(canonical(round_to_odd(value)));
      break;
    case DType::f16:
      *static_cast<f16*>(r.loss) = narrow<f16>(canonical(round_to_odd(value)));
      break;
    case DType::f64:
      *static_cast<double*>(r.loss) = value;
      break;
  }
}

}  // namespace

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

void store_result(const Result& r, const ExactSumState& total, double divisor) {
  if (!r.loss || r.reduction == Reduction::none) return;
  if (r.reduction == Reduction::mean) {
    store_rounded(r, round_exact(total, false) / divisor);
  } else {
    // Rounded to odd in fp64, so that the rounding to a narrower type is the only one.
    store_rounded(r, round_exact(total, r.loss_dtype != DType::f64));
  }
}

void store_result(const Result& r, double total, double divisor) {
  if (!r.loss || r.reduction == Reduction::none) return;
  store_rounded(r, r.reduction == Reduction::mean ? total / divisor : total);
}

}  // namespace mbk
