#pragma once
// The exact sum of fp32 numbers (Kulisch & Miranker's long accumulator for binary32) and its
// roundings. Integer additions commute, so the value does not depend on order, threads, cuts or
// ranks.
#include "core/args.h"
#include "core/lane.h"

namespace mbk::MBK_ISA {

inline constexpr int kLimbs = 9;

MBK_FN void clear(ExactSumState& s) { s = ExactSumState{}; }

// How a limb is added to: plainly, or atomically on a device.
struct PlainAdd {
  MBK_FN void operator()(int64_t& limb, int64_t value) const { limb += value; }
};

// Each call moves a limb by less than 2^32, so normalise() is due within 2^30 calls.
template <class Add = PlainAdd>
MBK_FN void add(ExactSumState& s, float x, Add into = Add{}) {
  const uint32_t u = bits(x);
  int exponent = (u >> 23) & 0xff;
  int64_t mantissa = u & 0x7fffff;
  if (exponent == 0xff) {
    into(mantissa ? s.nan : (u >> 31 ? s.negative_infinity : s.positive_infinity), 1);
    return;
  }
  if (exponent) {
    mantissa |= 0x800000;
    --exponent;
  }
  const uint64_t shifted = (uint64_t)mantissa << (exponent & 31);
  int64_t low = (int64_t)(shifted & 0xffffffffu), high = (int64_t)(shifted >> 32);
  const int64_t sign = -(int64_t)(u >> 31);  // 0 or -1: two's complement negation without a branch
  into(s.limb[exponent >> 5], (low ^ sign) - sign);
  into(s.limb[(exponent >> 5) + 1], (high ^ sign) - sign);
}

// Carries: every limb but the last ends in [0, 2^32). Equal sums have equal normalised states.
MBK_FN void normalise(ExactSumState& s) {
  int64_t carry = 0;
  for (int i = 0; i < kLimbs - 1; ++i) {
    const int64_t t = s.limb[i] + carry;
    carry = t >> 32;
    s.limb[i] = t & 0xffffffff;
  }
  s.limb[kLimbs - 1] += carry;
}

// Both must be normalised; so is the result.
MBK_FN void merge(ExactSumState& into, const ExactSumState& from) {
  for (int i = 0; i < kLimbs; ++i) into.limb[i] += from.limb[i];
  into.nan += from.nan;
  into.positive_infinity += from.positive_infinity;
  into.negative_infinity += from.negative_infinity;
  normalise(into);
}

// The sum as double: rounded to nearest even, or to odd, from where any narrower type is reached by
// one correct rounding (Boldo & Melquiond 2008). The state is used up.
MBK_FN double round_in_place(ExactSumState& s, bool to_odd) {
  if (s.nan || (s.positive_infinity && s.negative_infinity))
    return as_float((int64_t)0x7ff8000000000000);
  if (s.positive_infinity) return as_float((int64_t)0x7ff0000000000000);
  if (s.negative_infinity) return -as_float((int64_t)0x7ff0000000000000);
  normalise(s);
  const bool negative = s.limb[kLimbs - 1] < 0;
  if (negative) {
    for (int i = 0; i < kLimbs; ++i) s.limb[i] = -s.limb[i];
    normalise(s);
  }
  int top = kLimbs - 1;
  while (top > 0 && s.limb[top] == 0) --top;
  // The leading 64 bits, of which at least 33 + 1 are significant, and whether anything lies below
  // them.
  uint64_t high = (uint64_t)s.limb[top], low = 0;
  if (high == 0) return 0.0;
  int exponent = 32 * top - 149;
  bool sticky = false;
  for (int i = 0; i < top; ++i) {
    if (i == top - 1) low |= (uint64_t)s.limb[i] << 32;
    if (i == top - 2) low |= (uint64_t)s.limb[i];
    if (i < top - 2) sticky |= s.limb[i] != 0;
  }
  const int zeros = __builtin_clzll(high);
  uint64_t window = high << zeros;
  if (zeros) {
    window |= low >> (64 - zeros);
    sticky |= (low << zeros) != 0;
  } else {
    sticky |= low != 0;
  }
  exponent -= zeros;
  if (to_odd) {
    const bool rest = sticky || (window & 0x7ff);
    window = (window & ~(uint64_t)0x7ff) | (rest ? 0x800 : 0);
  } else if (sticky) {
    window |= 1;
  }
  // window * 2^exponent: the conversion rounds to nearest even; the scale is a normal power of two.
  const double magnitude = (double)window * as_float((int64_t)(1023 + exponent) << 52);
  return negative ? -magnitude : magnitude;
}
MBK_FN double round_exact(ExactSumState s, bool to_odd) { return round_in_place(s, to_odd); }
MBK_FN float round_to_float(const ExactSumState& s) { return (float)round_exact(s, true); }

}  // namespace mbk::MBK_ISA
