#pragma once
// A list of tensors as a kernel's parameter, so that one launch does for many tensors and no table
// is copied to the device.
#include <algorithm>
#include <vector>

#include "core/block_sum.h"
#include "core/dtype.h"
#include "cuda/device.h"
#include "cuda/exact.cuh"

namespace mbk::MBK_ISA {

// A warp has a segment of a block of elements, a thread one lane of the segment's sum.
inline constexpr int kListThreads = kSegments * kSumLanes, kSteps = kSegment / kSumLanes;
inline constexpr size_t kListSharedBytes = kSegments * sizeof(double);  // of join_block

// A tensor whose views all lie dense: element i is i elements behind the first.
struct DenseTensor {
  static constexpr bool kDense = true;
  void* data[kListViews];
  int64_t size, first_block, start;  // start: its first block among those of the launch
  double l1, l2;
  uint64_t key;
  int32_t index;
  uint8_t dtypes[kListViews];

  MBK_DEVICE int64_t offset(int, int64_t i) const { return i; }
  MBK_FN DType dtype(int view) const { return (DType)dtypes[view]; }
  MBK_DEVICE void* at(int view) const { return data[view]; }

  static bool takes(const ListTensor& t) { return t.dense(); }
  static DenseTensor of(const ListTensor& t) {
    DenseTensor d{};
    d.size = t.size, d.first_block = t.first_block, d.l1 = t.l1, d.l2 = t.l2, d.key = t.key;
    for (int v = 0; v < kListViews; ++v)
      d.data[v] = t.views[v].data, d.dtypes[v] = (uint8_t)t.views[v].dtype;
    return d;
  }
};
// Any other.
struct AnyTensor : ListTensor {
  static constexpr bool kDense = false;
  int64_t start;
  int32_t index;

  MBK_DEVICE int64_t offset(int view, int64_t i) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += i % shape[d] * views[view].strides[d];
      i /= shape[d];
    }
    return offset + i * views[view].strides[0];
  }
  MBK_FN DType dtype(int view) const { return views[view].dtype; }
  MBK_DEVICE void* at(int view) const { return views[view].data; }

  static bool takes(const ListTensor& t) { return !t.dense(); }
  static AnyTensor of(const ListTensor& t) {
    AnyTensor a{};
    static_cast<ListTensor&>(a) = t;
    return a;
  }
};

template <class Item, int kItems, class Args>
struct ListLaunch {
  int count;
  int64_t blocks;
  Args args;
  Item items[kItems];

  MBK_DEVICE const Item& item_of(int64_t block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (items[middle].start <= block)
        low = middle;
      else
        high = middle - 1;
    }
    return items[low];
  }
};

// As many tensors as a kernel's parameters hold (32764 bytes), or a few, which launch faster.
template <class Item>
inline constexpr int kManyItems = 32000 / sizeof(Item);
inline constexpr int kFewItems = 8;

// Calls kernel(launch) for all tensors of a list that an Item takes, so many at a time; blocks of
// threads: one for each that `work` counts of a tensor, at most 8 a multiprocessor.
template <class Item, int kItems, class Args, class Kernel, class Count>
void launch_items(const std::vector<Item>& items, const Args& args, Kernel kernel, Count work,
                  cudaStream_t stream) {
  for (size_t first = 0; first < items.size(); first += kItems) {
    ListLaunch<Item, kItems, Args> p{};
    p.args = args;
    for (size_t k = first; k < items.size() && p.count < kItems; ++k) {
      Item& item = p.items[p.count++] = items[k];
      item.start = p.blocks;
      p.blocks += work(item);
    }
    if (!p.blocks) continue;
    const auto grid = static_cast<unsigned>(
        std::min<int64_t>(p.blocks, int64_t{8} * current_device().multiprocessors));
    check(launch(kernel, p, grid, kListThreads, 1, kListSharedBytes, stream),
          "launching a list of tensors");
  }
}

// The items of a list, chosen once.
template <class Item>
std::vector<Item> items_of(const TensorList& list) {
  std::vector<Item> items;
  for (int64_t t = 0; t < list.count; ++t) {
    if (!Item::takes(list.tensors[t]) || !list.tensors[t].size) continue;
    items.push_back(Item::of(list.tensors[t]));
    items.back().index = static_cast<int32_t>(t);
  }
  return items;
}

// ---- sums of a block of threads -----------------------------------------------------------------

// The joined lanes and segments, to thread 0. Every thread of the block takes part.
MBK_DEVICE double join_block(double lane) {
  double* const sums = shared_memory<double>();
  for (int half = kSumLanes / 2; half; half /= 2) lane += __shfl_xor_sync(kWholeWarp, lane, half);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kSumLanes == 0) sums[threadIdx.x / kSumLanes] = lane;
  __syncthreads();
  double joined[kSegments];
#pragma unroll
  for (int s = 0; s < kSegments; ++s) joined[s] = sums[s];
  return join_segments(joined);
}

// block_sum of n numbers, by a block of threads; to all of them.
template <class Value>
MBK_DEVICE double block_sum_by_threads(int64_t n, Value value) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kListBlock) {
    const int64_t first = begin + threadIdx.x / kSumLanes * kSegment + threadIdx.x % kSumLanes;
    double lane = 0;
    for (int k = 0; k < kSteps; ++k)
      if (first + k * kSumLanes < n) lane += value(first + k * kSumLanes);
    total += join_block(lane);
  }
  return total;
}

}  // namespace mbk::MBK_ISA
