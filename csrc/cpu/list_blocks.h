#pragma once
// The blocks of a list of tensors on the CPU: which tensor a block belongs to, segments as arrays
// of the type that is computed in, and sums in the lanes of core/block_sum.h.
#include "core/block_sum.h"
#include "cpu/chunk.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

// Calls f(tensor, first block within it, blocks) for the tensors of the list's blocks [begin, end).
template <class F>
MBK_FN void each_tensor(const TensorList& list, int64_t begin, int64_t end, F f) {
  int64_t low = 0, high = list.count - 1;  // the last tensor whose first block is <= begin
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (list.tensors[middle].first_block <= begin)
      low = middle;
    else
      high = middle - 1;
  }
  for (const ListTensor* t = list.tensors + low; begin < end; ++t) {
    const int64_t last = t->first_block + list_blocks(t->size);
    const int64_t stop = last < end ? last : end;
    if (stop > begin) f(*t, begin - t->first_block, stop - begin);
    begin = stop;
  }
}

// Threads that are worth waking for the list, and the blocks that one takes at a time.
template <class F>
MBK_FN void for_blocks(const TensorList& list, int threads, F& body) {
  int64_t elements = 0;
  for (int64_t t = 0; t < list.count; ++t) elements += list.tensors[t].size;
  const int64_t worthwhile = elements / kElementsPerTask + 1;
  if (worthwhile < threads) threads = (int)worthwhile;
  parallel_for(list.blocks, kElementsPerTask / kListBlock, threads, body);
}

// The lanes of one segment's sum.
struct SegmentSum {
  f64v lane[kSumLanes / lanes<f64v>];
  MBK_FN SegmentSum() {
    for (f64v& l : lane) l = f64v{};
  }
  // Of numbers [first, first + lanes<f64v>) of a group of kSumLanes.
  MBK_FN f64v& at(int first) { return lane[first / lanes<f64v>]; }
  MBK_FN double value() const { return sum_lanes(lane); }
};

// Elements of a view as T, with zeros up to a whole group of lanes.
template <class T>
MBK_PASS void read_segment(const View& view, const Range& range, T* buffer) {
  for (int k = range.count; k % kSumLanes; ++k) buffer[k] = 0;
  switch (view.dtype) {
    case DType::f32:
      return read_as<T, float>(view, range, buffer);
    case DType::bf16:
      return read_as<T, bf16>(view, range, buffer);
    case DType::f16:
      return read_as<T, f16>(view, range, buffer);
    default:
      return read_as<T, double>(view, range, buffer);
  }
}

}  // namespace
}  // namespace mbk::MBK_ISA
