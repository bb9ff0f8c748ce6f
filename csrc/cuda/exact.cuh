#pragma once
// Exact sums on a device. A thread adds into two fp64 bins (core/exact_bins.h); bins are joined
// over a warp as integers, and states by integer atomics: all of it commutes, so no order matters.
#include "core/exact_bins.h"
#include "cuda/platform.cuh"

#define MBK_DEVICE __device__ __forceinline__

namespace mbk::MBK_ISA {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

// The larger of two numbers; NaN if either is.
template <class T>
MBK_DEVICE T max_or_nan(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    T m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
  }
#endif
  return a > b || a != a ? a : b;
}

struct AtomicAdd {
  MBK_DEVICE void operator()(int64_t& limb, int64_t value) const {
    atomicAdd((unsigned long long*)&limb, (unsigned long long)value);
  }
};

MBK_DEVICE int64_t warp_sum(int64_t x) {
  for (int offset = 16; offset; offset /= 2)
    x += (int64_t)__shfl_xor_sync(kWholeWarp, (long long)x, offset);
  return x;
}

// Out of line: rare and long. A call costs registers, though.
static __device__ __noinline__ void add_odd(ExactSumState& state, float x) {
  add(state, x, AtomicAdd{});
}
static __device__ __noinline__ void add_full_bins(ExactSumState& state, double coarse,
                                                  double fine) {
  add_integer(state, (int64_t)(coarse * 0x1p16), 149 - kCoarse, AtomicAdd{});
  add_integer(state, (int64_t)(fine * 0x1p60), 149 - kFine, AtomicAdd{});
}

// What one thread adds up; kCompact: with what is rare out of line. `state` is the warp's own, or
// shared by several: it takes what the bins do not hold.
template <bool kCompact>
struct ThreadSums {
  double coarse = 0, fine = 0;
  int additions = 0;
  bool overflowed = false;

  MBK_DEVICE void add(float x, ExactSumState& state) {
    if (!fits_bins(abs(x))) {
      if constexpr (kCompact)
        add_odd(state, x);
      else
        mbk::MBK_ISA::add(state, x, AtomicAdd{});
      overflowed = true;
      return;
    }
    add_split((double)x);
    if (++additions == kFlush) flush(state);
  }
  // A multiple of 2^-kFine; at most kFlush of them between two flushes.
  MBK_DEVICE void add_split(double d) {
    const double c = coarse_part(d);
    coarse += c;
    fine += d - c;
  }
  MBK_DEVICE void flush(ExactSumState& state) {
    if constexpr (kCompact) {
      add_full_bins(state, coarse, fine);
    } else {
      add_integer(state, (int64_t)(coarse * 0x1p16), 149 - kCoarse, AtomicAdd{});
      add_integer(state, (int64_t)(fine * 0x1p60), 149 - kFine, AtomicAdd{});
    }
    coarse = fine = 0;
    additions = 0;
    overflowed = true;
  }
  // The bins of the 32 lanes of a warp, added to a state by one of them.
  MBK_DEVICE void flush_warp(ExactSumState& state) {
    const int64_t c = warp_sum((int64_t)(coarse * 0x1p16)), f = warp_sum((int64_t)(fine * 0x1p60));
    if (threadIdx.x % 32 == 0) {
      add_integer(state, c, 149 - kCoarse, AtomicAdd{});
      add_integer(state, f, 149 - kFine, AtomicAdd{});
    }
    coarse = fine = 0;
    additions = 0;
  }
  // The sum over the lanes of a warp, rounded once, in every lane. `state` is the warp's own; it is
  // zero before and after.
  MBK_DEVICE float warp_total(ExactSumState& state) {
    const int64_t c = warp_sum((int64_t)(coarse * 0x1p16)), f = warp_sum((int64_t)(fine * 0x1p60));
    constexpr int64_t kExact = int64_t{1} << 53;
    if (!__any_sync(kWholeWarp, overflowed) && f < kExact && f > -kExact)
      return round_bins((double)c * 0x1p-16, (double)f * 0x1p-60);
    float total = 0;
    __syncwarp(kWholeWarp);
    if (threadIdx.x % 32 == 0) {
      add_integer(state, c, 149 - kCoarse);
      add_integer(state, f, 149 - kFine);
      total = (float)round_in_place(state, true);
      clear(state);
    }
    __syncwarp(kWholeWarp);
    return __shfl_sync(kWholeWarp, total, 0);
  }
};
using ThreadSum = ThreadSums<false>;
using CompactThreadSum = ThreadSums<true>;

// What a thread adds up in rounds that whole warps take together, with at most kEach additions a
// round. Full bins are joined over the warp, not by each thread for itself: all threads of a block
// have theirs full at the same time, and an atomic addition of 64 bits in shared memory is tried
// again as long as another thread gets in between.
template <int kEach>
struct SumInRounds {
  CompactThreadSum bins;
  int rounds = 0;

  MBK_DEVICE void end_round(ExactSumState& state) {
    if (++rounds < kFlush / kEach - 1) return;
    rounds = 0;
    bins.flush_warp(state);
  }
};

}  // namespace mbk::MBK_ISA
