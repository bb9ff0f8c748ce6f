#pragma once
// The exact sum of many fp32 numbers at the speed of vectors: each is split, exactly, into a
// multiple of 2^-16 and a rest that is a multiple of 2^-60, and both are summed in fp64, which
// stays exact for kFlush additions; then the bins move to the long accumulator. Numbers outside
// [2^-36, 2^20) go there directly.
#include "core/dtype.h"
#include "core/exact_sum.h"

namespace mbk::MBK_ISA {

// s += value * 2^(position - 149)
template <class Add = PlainAdd>
MBK_FN void add_integer(ExactSumState& s, int64_t value, int position, Add into = Add{}) {
  const int64_t sign = value >> 63;
  const uint64_t magnitude = (uint64_t)((value ^ sign) - sign);
  const int limb = position >> 5, shift = position & 31;
  const uint64_t part[2] = {(magnitude & 0xffffffffu) << shift, (magnitude >> 32) << shift};
  for (int k = 0; k < 2; ++k) {
    const int64_t low = (int64_t)(part[k] & 0xffffffffu), high = (int64_t)(part[k] >> 32);
    into(s.limb[limb + k], (low ^ sign) - sign);
    into(s.limb[limb + k + 1], (high ^ sign) - sign);
  }
}

inline constexpr int kCoarse = 16, kFine = 60;  // bins hold multiples of 2^-kCoarse and 2^-kFine
inline constexpr int kFlush = 512;              // additions for which the bins stay exact

// Which of the numbers, given without their signs, can be split.
template <class V>
MBK_FN Int<V> fits_bins(V magnitude) {
  typedef Int<V> Mask;  // of one lane too, where a comparison is a bool
  return (Mask)(magnitude < splat<V>(0x1p20f)) &
         ((Mask)(magnitude >= splat<V>(0x1p-36f)) | (Mask)(magnitude == V{}));
}
// The multiple of 2^-kCoarse that is nearest to x: adding 1.5 * 2^(52 - kCoarse) rounds to it.
template <class D>
MBK_FN D coarse_part(D x) {
  constexpr double kShift = 0x1.8p36;
  return (x + kShift) - kShift;
}
MBK_FN void add_bins(ExactSumState& s, double coarse, double fine, int shift) {
  add_integer(s, (int64_t)(coarse * 0x1p16), 149 - kCoarse - shift);
  add_integer(s, (int64_t)(fine * 0x1p60), 149 - kFine - shift);
}

// Zeros, and numbers of a narrower range, need no splitting at first: kBatch of them add up exactly
// in one fp64 bin, which is split then.
inline constexpr int32_t kNarrowLeast = 0x35800000, kNarrowEnd = 0x42800000;  // 2^-20, 2^6
inline constexpr int kBatch = 16;

// Out of line and by value, so that the bins of a loop stay in registers.
static MBK_RARE void add_bins_of(ExactSumState& s, f64v coarse, f64v fine, int shift = 0) {
  for (int l = 0; l < lanes<f64v>; ++l) add_bins(s, get(coarse, l), get(fine, l), shift);
}
static MBK_RARE void add_lanes_of(ExactSumState& s, f32v x) {
  for (int l = 0; l < lanes<f32v>; ++l) add(s, get(x, l));
}

// What misses cost: a vector outside the narrow range some 10 cycles, one that has to be added one
// by one as many as kLongMiss of them.
inline constexpr int kLongMiss = 32;

struct ExactBins {
  ExactSumState& total;
  f64v narrow[kDoubleParts], coarse[kDoubleParts], fine[kDoubleParts];
  int batch = 0, additions = 0;
  unsigned misses = 0;

  MBK_FN explicit ExactBins(ExactSumState& t) : total(t) {
    for (int part = 0; part < kDoubleParts; ++part)
      narrow[part] = coarse[part] = fine[part] = f64v{};
  }

  template <int n>
  MBK_FN void add(const f32v (&x)[n]) {
    i32v magnitude[n];
    for (int k = 0; k < n; ++k) magnitude[k] = as_int(abs(x[k]));
    if (any_outside(magnitude, kNarrowLeast, kNarrowEnd - 1)) {
      for (const f32v v : x) add_wide(v);
      return;
    }
    if (batch + n > kBatch) split_batch();
    batch += n;
    for (int part = 0; part < kDoubleParts; ++part) {
      f64v wide[n];
      for (int k = 0; k < n; ++k) wide[k] = widen_part(x[k], part);
      narrow[part] = narrow[part] + sum_vectors(wide);
    }
  }
  MBK_FN void split_batch() {
    for (int part = 0; part < kDoubleParts; ++part) {
      add_split(narrow[part], part);
      narrow[part] = f64v{};
    }
    batch = 0;
    if (++additions == kFlush) flush_bins();
  }
  MBK_FN void add_split(f64v d, int part) {
    const f64v c = coarse_part(d);
    coarse[part] = coarse[part] + c;
    fine[part] = fine[part] + (d - c);
  }
  MBK_FN void add_wide(f32v x) {
    if (any(fits_bins(abs(x)) == 0)) {
      add_lanes_of(total, x);
      misses += kLongMiss;
      return;
    }
    ++misses;
    for (int part = 0; part < kDoubleParts; ++part) add_split(widen_part(x, part), part);
    if (++additions == kFlush) flush_bins();
  }
  MBK_FN void flush_bins() {
    for (int part = 0; part < kDoubleParts; ++part) {
      add_bins_of(total, coarse[part], fine[part]);
      coarse[part] = fine[part] = f64v{};
    }
    additions = 0;
  }
  MBK_FN void flush() {
    split_batch();
    flush_bins();
  }
};

// The same one by one, for what the bins do not hold.
MBK_FN void add_each(ExactSumState& s, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) add(s, x[i]);
}
// Both bins of a few numbers; false if one does not fit. Reads whole vectors.
template <class V>
MBK_FN bool sum_bins(const float* x, int64_t n, double& coarse, double& fine) {
  constexpr int kParts = lanes<V> == 1 ? 1 : kDoubleParts;
  typedef decltype(widen_part(V{}, 0)) D;
  D c_sum = D{}, f_sum = D{};
  Int<V> unfit = Int<V>{};
  for (int64_t i = 0; i < n; i += lanes<V>) {
    const V v = load<V>(x + i);
    unfit |= fits_bins(abs(v)) == 0;
    for (int part = 0; part < kParts; ++part) {
      const D d = widen_part(v, part), c = coarse_part(d);
      c_sum = c_sum + c;
      f_sum = f_sum + (d - c);
    }
  }
  coarse = sum_lanes(c_sum), fine = sum_lanes(f_sum);
  return !any(unfit);
}
// Adds at most kFlush numbers, in memory for whole vectors; what lies behind the last is
// overwritten.
MBK_FN void add_few(ExactSumState& s, float* x, int n) {
  for (int k = n; k % lanes<f32v> != 0; ++k) x[k] = 0;
  double coarse, fine;
  sum_bins<f32v>(x, n, coarse, fine) ? add_bins(s, coarse, fine, 0) : add_each(s, x, n);
}
// The sum of both bins, rounded once to float. |fine| is below 2^-7, coarse 0 or at least 2^-16:
// Knuth's sum is exact, and rounding it to odd leaves one rounding, that to float.
MBK_FN float round_bins(double coarse, double fine) {
  double s = coarse + fine;
  const double v = s - coarse, error = (coarse - (s - v)) + (fine - v);
  if (error != 0 && !(bits(s) & 1))
    s = as_float((int64_t)(bits(s) + ((error > 0) == (s > 0) ? 1 : -1)));
  return (float)s;
}
// The sum of at most kScalar numbers of [2^-16, 2^11), exact in fp64: a multiple of 2^-39 below
// 2^14. False if one is not. The shortest chain of operations: a row waits for its sum. One by one,
// as they were just written: they are not yet a vector to be loaded.
inline constexpr int kScalar = 8;
MBK_FN bool sum_near(const float* x, int64_t n, double& sum) {
  constexpr uint32_t kLeast = 0x37800000, kEnd = 0x45000000;
  bool outside = false;
  sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    outside |= (bits(x[i]) & 0x7fffffff) - kLeast >= kEnd - kLeast;
    sum += (double)x[i];
  }
  return !outside;
}
// The exact sum of at most kFlush numbers, rounded once to float. What lies behind the last number,
// up to a whole vector, must be 0.
MBK_FN float sum_few(const float* x, int64_t n) {
  double c, f;
  if (n <= kScalar && sum_near(x, n, c)) return (float)c;
  if (!(n <= kScalar ? sum_bins<float>(x, n, c, f) : sum_bins<f32v>(x, n, c, f))) {
    ExactSumState s{};
    add_each(s, x, n);
    return round_to_float(s);
  }
  return round_bins(c, f);
}

}  // namespace mbk::MBK_ISA
