#pragma once
// Sums over the tensors of a list, in one order on every chip. Numbers are summed in blocks of
// kListBlock, cut into segments: number i of a segment belongs to lane i % kSumLanes; a lane adds
// its numbers in order, lanes are joined by halves, segments of a block by halves. Block sums are
// summed in the same way, blocks of blocks in order; so are the sums of tensors, to that of a list.
// A thread of the CPU has a segment's lanes in its registers, a warp of a GPU has one a thread.
#include "core/lane.h"
#include "core/tensor_list.h"

namespace mbk::MBK_ISA {

inline constexpr int kSumLanes = 32, kSegment = 512, kSegments = kListBlock / kSegment;

MBK_FN double join_segments(double (&sums)[kSegments]) {
  for (int half = kSegments / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

// The sum of n numbers value(0) ... value(n - 1), one after the other.
template <class Value>
MBK_FN double block_sum(int64_t n, Value value) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kListBlock) {
    double sums[kSegments] = {};
    for (int s = 0; s < kSegments; ++s) {
      const int64_t first = begin + s * kSegment, rest = n - first;
      if (rest <= 0) break;
      const int count = rest < kSegment ? (int)rest : kSegment;
      double lane[kSumLanes] = {};
      for (int i = 0; i < count; ++i) lane[i % kSumLanes] += value(first + i);
      for (int half = kSumLanes / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
      sums[s] = lane[0];
    }
    total += join_segments(sums);
  }
  return total;
}

// The factor that brings a norm to max_norm, at most 1; torch.nn.utils.clip_grad_norm_'s formula.
MBK_FN double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1.0 : factor;  // NaN stays
}

}  // namespace mbk::MBK_ISA
