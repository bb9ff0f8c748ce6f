#pragma once
// The exact sum of a thread's losses, whatever their magnitude.
#include "core/exact_bins.h"

namespace mbk::MBK_ISA {
namespace {

// Bins for numbers that are all small, or all large: those of ExactBins hold [2^-36, 2^20). Here
// they hold numbers times 2^shift, which follows the largest.
struct ShiftedBins {
  static constexpr int kLeast = -90, kMost = 89;  // what the accumulator has limbs for

  ExactSumState& total;
  f64v coarse[kDoubleParts], fine[kDoubleParts];
  int additions = 0, shift = 0;

  MBK_FN explicit ShiftedBins(ExactSumState& t) : total(t) { clear(); }

  MBK_FN void clear() {
    for (int part = 0; part < kDoubleParts; ++part) coarse[part] = fine[part] = f64v{};
    additions = 0;
  }
  MBK_FN bool fits(const float* x, int n) const {
    const int moved = shift * 0x800000;
    bool outside = false;
    for (int k = 0; k < n; k += lanes<f32v>) {
      const i32v magnitude[] = {as_int(abs(load<f32v>(x + k)))};
      outside |= any_outside(magnitude, as_int(0x1p-36f) - moved, as_int(0x1p20f) - 1 - moved);
    }
    return !outside;
  }
  // n: whole vectors, at most kFlush.
  MBK_PASS void add(const float* x, int n) {
    if (!fits(x, n)) {
      follow(x, n);
      if (!fits(x, n)) return add_some(x, n);
    }
    if (additions + n / lanes<f32v> > kFlush) flush();
    additions += n / lanes<f32v>;
    const f64v power = splat<f64v>(as_float((int64_t)(1023 + shift) << 52));
    f64v c[kDoubleParts], f[kDoubleParts];
    for (int part = 0; part < kDoubleParts; ++part) c[part] = coarse[part], f[part] = fine[part];
    for (int k = 0; k < n; k += lanes<f32v>) {
      const f32v v = load<f32v>(x + k);
      for (int part = 0; part < kDoubleParts; ++part) {
        const f64v d = widen_part(v, part) * power, near = coarse_part(d);
        c[part] = c[part] + near;
        f[part] = f[part] + (d - near);
      }
    }
    for (int part = 0; part < kDoubleParts; ++part) coarse[part] = c[part], fine[part] = f[part];
  }
  // Of numbers further apart, a vector at a time what fits, one by one what does not.
  MBK_RARE void add_some(const float* x, int n) {
    for (int k = 0; k < n; k += lanes<f32v>)
      fits(x + k, lanes<f32v>) ? add(x + k, lanes<f32v>) : add_lanes_of(total, load<f32v>(x + k));
  }
  // Brings the largest of the finite numbers to 2^10.
  MBK_RARE void follow(const float* x, int n) {
    int exponent = 0;
    for (int k = 0; k < n; ++k) {
      const int of_this = as_int(abs(x[k])) >> 23;
      if (of_this > exponent && of_this < 255) exponent = of_this;
    }
    const int wanted = 127 + 10 - exponent;
    flush();
    shift = wanted < kLeast ? kLeast : wanted > kMost ? kMost : wanted;
  }
  MBK_RARE void flush() {
    if (additions == 0) return;
    for (int part = 0; part < kDoubleParts; ++part)
      add_bins_of(total, coarse[part], fine[part], shift);
    clear();
  }
};

// Losses are summed as they are computed, hidden behind the memory accesses, until in some chunk
// that took longer than it takes from an array. The bins of the first way are kept apart: in
// registers.
struct LossSums {
  const bool wanted;
  bool from_array = false;
  ShiftedBins shifted;

  // Null: no sum is wanted.
  MBK_FN LossSums(ExactSumState* total, ExactSumState& unused)
      : wanted(total), shifted(total ? *total : unused) {}

  MBK_FN bool at_once() const { return wanted && !from_array; }
  // Of `count` losses those from `whole` on were not summed at once.
  MBK_FN void end_chunk(const float* losses, int whole, int count, ExactBins& bins) {
    if (!wanted) return;
    if (from_array) return shifted.add(losses, count);
    for (int k = whole; k < count; k += lanes<f32v>) bins.add({load<f32v>(losses + k)});
    from_array = (int)bins.misses > 2 * count / lanes<f32v>;
    bins.misses = 0;
  }
};

}  // namespace
}  // namespace mbk::MBK_ISA
