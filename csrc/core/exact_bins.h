#pragma once
// The exact sum of many fp32 numbers at the speed of vectors: each is split, exactly, into a
// multiple of 2^-16 and a rest that is a multiple of 2^-60, and both are summed in fp64, which
// stays exact for kFlush additions; then the bins move to the long accumulator. Numbers outside
// [2^-36, 2^20) go there directly.
#include "core/exact_sum.h"

namespace mbk::MBK_ISA {

// s += value * 2^(position - 149)
MBK_FN void add_integer(ExactSumState& s, int64_t value, int position) {
  const int64_t sign = value >> 63;
  const uint64_t magnitude = (uint64_t)((value ^ sign) - sign);
  const int limb = position >> 5, shift = position & 31;
  const uint64_t part[2] = {(magnitude & 0xffffffffu) << shift, (magnitude >> 32) << shift};
  for (int k = 0; k < 2; ++k) {
    const int64_t low = (int64_t)(part[k] & 0xffffffffu), high = (int64_t)(part[k] >> 32);
    s.limb[limb + k] += (low ^ sign) - sign;
    s.limb[limb + k + 1] += (high ^ sign) - sign;
  }
}

struct ExactBins {
  static constexpr int kFlush = 512;
  static constexpr int kCoarse = 16,
                       kFine = 60;  // the bins hold multiples of 2^-kCoarse and 2^-kFine

  ExactSumState& total;
  f64v coarse[kDoubleParts], fine[kDoubleParts];
  int additions = 0;

  MBK_FN explicit ExactBins(ExactSumState& t) : total(t) {
    for (int part = 0; part < kDoubleParts; ++part) coarse[part] = fine[part] = f64v{};
  }

  MBK_FN void add(f32v x) {
    const f32v a = abs(x);
    typedef Int<f32v> Mask;  // of one lane too, where a comparison is a bool
    const Mask fits = (Mask)(a < splat<f32v>(0x1p20f)) &
                      ((Mask)(a >= splat<f32v>(0x1p-36f)) | (Mask)(a == f32v{}));
    if (any(fits == 0)) {
      for (int l = 0; l < lanes<f32v>; ++l) mbk::MBK_ISA::add(total, get(x, l));
      return;
    }
    // Adding and subtracting 1.5 * 2^(52 - kCoarse) rounds to a multiple of 2^-kCoarse.
    constexpr double kShift = 0x1.8p36;
    for (int part = 0; part < kDoubleParts; ++part) {
      const f64v d = widen_part(x, part), c = (d + kShift) - kShift;
      coarse[part] = coarse[part] + c;
      fine[part] = fine[part] + (d - c);
    }
    if (++additions == kFlush) flush();
  }

  MBK_FN void flush() {
    for (int part = 0; part < kDoubleParts; ++part) {
      for (int l = 0; l < lanes<f64v>; ++l) {
        add_integer(total, (int64_t)(get(coarse[part], l) * 0x1p16), 149 - kCoarse);
        add_integer(total, (int64_t)(get(fine[part], l) * 0x1p60), 149 - kFine);
      }
      coarse[part] = fine[part] = f64v{};
    }
    additions = 0;
  }
};

}  // namespace mbk::MBK_ISA
