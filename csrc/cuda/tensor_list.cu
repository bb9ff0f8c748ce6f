// Lists of tensors: gradients added into buffers, buffers flushed into gradients.
#include <math.h>

#include "core/list_items.h"
#include "cuda/calls.h"
#include "cuda/list_table.cuh"
#include "cuda/packed.cuh"

namespace mbk::MBK_ISA {
namespace {

// Where the thread's elements of a block begin; they are kSumLanes apart.
template <class Item>
MBK_DEVICE int64_t first_element(const Item& t, int64_t block) {
  return (block - t.start) * kListBlock + threadIdx.x / kSumLanes * kSegment +
         threadIdx.x % kSumLanes;
}

// kHalf of a thread's elements, from `first` on: all loads are under way before the first is
// needed, and few enough of them for three blocks a multiprocessor. kWhole: the block is full.
constexpr int kHalf = kSteps / 2;
template <class T, class S, bool kWhole, class Item>
MBK_DEVICE void add_half(const Accumulation<T>& item, const Item& t, int64_t first, bool squares,
                         double& lane) {
  T* const buffer = (T*)t.at(kBuffer);
  const S* const grad = (const S*)t.at(kListGrad);
  T g[kHalf], b[kHalf];
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const int64_t i = first + k * kSumLanes;
    const bool in = kWhole || i < t.size;
    g[k] = in ? (T)widen(grad[t.offset(kListGrad, i)]) : (T)0;
    b[k] = in && item.reads ? buffer[t.offset(kBuffer, i)] : (T)0;
  }
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const int64_t i = first + k * kSumLanes;
    if (kWhole || i < t.size)
      buffer[t.offset(kBuffer, i)] = item.reads ? item.of(b[k], g[k]) : item.of(g[k]);
    if (squares) lane = plus_square<T>(lane, (double)g[k]);
  }
}
template <class T, class S, class Item>
MBK_DEVICE double add_elements(const AccumulateArgs& a, const Item& t, int64_t first) {
  const Accumulation<T> item(a);
  const bool whole = first + (kSteps - 1) * kSumLanes < t.size;
  double lane = 0;
#pragma unroll 1
  for (int64_t from = first; from < first + kSegment; from += kHalf * kSumLanes) {
    if (Item::kDense && whole)
      add_half<T, S, Item::kDense>(item, t, from, a.squares, lane);
    else
      add_half<T, S, false>(item, t, from, a.squares, lane);
  }
  return lane;
}

MBK_DEVICE double load_double(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return ((const float*)p)[i];
    case DType::bf16:
      return widen(((const bf16*)p)[i]);
    case DType::f16:
      return widen(((const f16*)p)[i]);
    default:
      return ((const double*)p)[i];
  }
}

// add_elements into bf16, from any type but fp64.
template <class Item>
MBK_DEVICE double add_to_bf16(const AccumulateArgs& a, const Item& t, int64_t first) {
  const Bf16Accumulation item{Accumulation<float>(a)};
  const RandomBits random(t.key);
  bf16 *const buffer = (bf16*)t.at(kBuffer), *const low = (bf16*)t.at(kListLow);
  double lane = 0;
#pragma unroll 1
  for (int k = 0; k < kSteps; ++k) {
    const int64_t i = first + k * kSumLanes;
    if (i >= t.size) break;
    const float g = (float)load_double(t.at(kListGrad), t.dtype(kListGrad), t.offset(kListGrad, i));
    bf16& at = buffer[t.offset(kBuffer, i)];
    float b = item.item.reads ? widen(at) : 0;
    if (low) {
      bf16& low_at = low[t.offset(kListLow, i)];
      float l = item.item.reads ? widen(low_at) : 0;
      item.paired(b, l, g);
      low_at = narrow<bf16>(l);
    } else {
      b = item.by_chance(b, g, (int32_t)(random.at<float>(i) >> 16));
    }
    at = narrow<bf16>(b);
    lane = plus_square<float>(lane, (double)g);
  }
  return lane;
}

template <class Item>
MBK_DEVICE double add_to_wide(const AccumulateArgs& a, const Item& t, int64_t first) {
  const DType grad = t.dtype(kListGrad);
  if (t.dtype(kBuffer) == DType::f64) {
    if (grad == DType::f64) return add_elements<double, double>(a, t, first);
    if (grad == DType::f32) return add_elements<double, float>(a, t, first);
    if (grad == DType::bf16) return add_elements<double, bf16>(a, t, first);
    return add_elements<double, f16>(a, t, first);
  }
  if (grad == DType::f32) return add_elements<float, float>(a, t, first);
  if (grad == DType::bf16) return add_elements<float, bf16>(a, t, first);
  return add_elements<float, f16>(a, t, first);
}

// Of the list's buffers those of bf16, or all others: two kernels, as few calls have both.
template <bool kBf16, class Item, int kItems>
__global__ void __launch_bounds__(kListThreads, Item::kDense ? 3 : 2)
    accumulate_list(const __grid_constant__ ListLaunch<Item, kItems, AccumulateArgs> p) {
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Item& t = p.item_of(block);
    if ((t.dtype(kBuffer) == DType::bf16) != kBf16) continue;
    const int64_t first = first_element(t, block);
    double lane;
    if constexpr (kBf16)
      lane = add_to_bf16(p.args, t, first);
    else
      lane = add_to_wide(p.args, t, first);
    if (!p.args.squares) continue;
    const double sum = join_block(lane);
    if (threadIdx.x == 0) p.args.squares[t.first_block + block - t.start] = sum;
  }
}

template <class T>
MBK_DEVICE void store_as(void* p, DType dtype, int64_t i, T v) {
  switch (dtype) {
    case DType::f32:
      ((float*)p)[i] = converted<float>(v);
      break;
    case DType::bf16:
      ((bf16*)p)[i] = narrow<bf16>(converted<bf16>(v));
      break;
    case DType::f16:
      ((f16*)p)[i] = narrow<f16>(converted<f16>(v));
      break;
    default:
      ((double*)p)[i] = converted<double>(v);
  }
}

// Element i of a buffer.
template <class T, class Item>
MBK_DEVICE T sum_at(const Item& t, int64_t i) {
  if (sizeof(T) == 8 || t.dtype(kBuffer) == DType::f32)
    return ((const T*)t.at(kBuffer))[t.offset(kBuffer, i)];
  const bf16* const low = (const bf16*)t.at(kListLow);
  const float high = widen(((const bf16*)t.at(kBuffer))[t.offset(kBuffer, i)]);
  return (T)(low ? high + widen(low[t.offset(kListLow, i)]) : high);
}

template <class T, class Item>
MBK_DEVICE void flush_elements(const FlushArgs& a, const Item& t, int64_t first, double& square,
                               double& penalty) {
  const Flush<T> item(a);
  const bool has_penalty = t.l1 != 0 || t.l2 != 0;
  const bool write = a.write && t.at(kListGrad);
  T v[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int64_t i = first + k * kSumLanes;
    v[k] = i < t.size ? sum_at<T>(t, i) : (T)0;
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int64_t i = first + k * kSumLanes;
    if (i >= t.size) continue;
    if (has_penalty) {
      const T p = (T)load_double(t.at(kListParameter), t.dtype(kListParameter),
                                 t.offset(kListParameter, i));
      if (t.l1 == 0) {
        v[k] = item.template regularised<false>(v[k], p, (T)0, (T)t.l2);
        penalty = plus_square<T>(penalty, (double)p);
      } else {
        v[k] = item.template regularised<true>(v[k], p, (T)t.l1, (T)t.l2);
        penalty += penalty_of((double)p, t.l1, t.l2);
      }
    } else {
      v[k] = item.scaled(v[k]);
    }
    square = plus_square<T>(square, (double)v[k]);
    if (write)
      store_as(t.at(kListGrad), t.dtype(kListGrad), t.offset(kListGrad, i), item.clipped(v[k]));
  }
}

template <class Item, int kItems>
__global__ void __launch_bounds__(kListThreads, 2)
    flush_list(const __grid_constant__ ListLaunch<Item, kItems, FlushArgs> p) {
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Item& t = p.item_of(block);
    const int64_t first = first_element(t, block), at = t.first_block + block - t.start;
    double square = 0, penalty = 0;
    if (t.dtype(kBuffer) == DType::f64)
      flush_elements<double>(p.args, t, first, square, penalty);
    else
      flush_elements<float>(p.args, t, first, square, penalty);
    if (!p.args.squares) continue;
    square = join_block(square);
    if (threadIdx.x == 0) p.args.squares[at] = square;
    if (!p.args.penalties) continue;
    penalty = join_block(penalty);
    if (threadIdx.x == 0) p.args.penalties[at] = block_penalty(penalty, t.l1, t.l2);
  }
}

// From the sums of blocks to those of tensors.
struct TensorSums {
  const double* blocks[2];
  double* tensors[2];  // null: not wanted
};
template <class Item, int kItems>
__global__ void __launch_bounds__(kListThreads)
    sum_tensors(const __grid_constant__ ListLaunch<Item, kItems, TensorSums> p) {
  for (int64_t k = blockIdx.x; k < p.count; k += gridDim.x) {
    const Item& t = p.items[k];
    for (int kind = 0; kind < 2; ++kind) {
      if (!p.args.tensors[kind]) continue;
      const double* const first = p.args.blocks[kind] + t.first_block;
      const double sum = block_sum_by_threads((t.size + kListBlock - 1) / kListBlock,
                                              [&](int64_t b) { return first[b]; });
      if (threadIdx.x == 0) p.args.tensors[kind][t.index] = canonical(sum);
    }
  }
}

struct Stats {
  const double *squares, *penalties;
  int64_t count;
  double max_norm;
  double* stats;
};
__global__ void __launch_bounds__(kListThreads) list_stats(const __grid_constant__ Stats p) {
  const double total =
      canonical(block_sum_by_threads(p.count, [&](int64_t t) { return p.squares[t]; }));
  const double penalty =
      p.penalties
          ? canonical(block_sum_by_threads(p.count, [&](int64_t t) { return p.penalties[t]; }))
          : 0;
  if (threadIdx.x != 0) return;
  const double infinity = (double)__builtin_inff(), norm = sqrt(total);
  p.stats[kNorm] = norm;
  p.stats[kNonFinite] = total < infinity ? 0 : 1;
  p.stats[kClip] = p.max_norm < infinity ? clip_factor(norm, p.max_norm) : 1;
  p.stats[kPenalty] = penalty;
}

// The list in both forms.
struct Items {
  std::vector<DenseTensor> dense;
  std::vector<AnyTensor> any;
  cudaStream_t stream;

  Items(const TensorList& list, cudaStream_t s)
      : dense(items_of<DenseTensor>(list)), any(items_of<AnyTensor>(list)), stream(s) {}

  void accumulate(const AccumulateArgs& a) const {
    if (has<false>(dense) && dense.size() <= kFewItems)
      accumulate<false, kFewItems>(dense, a);
    else if (has<false>(dense))
      accumulate<false, kManyItems<DenseTensor>>(dense, a);
    if (has<false>(any)) accumulate<false, kManyItems<AnyTensor>>(any, a);
    if (has<true>(dense)) accumulate<true, kManyItems<DenseTensor>>(dense, a);
    if (has<true>(any)) accumulate<true, kManyItems<AnyTensor>>(any, a);
  }
  void flush(const FlushArgs& a) const {
    const auto blocks = [](const auto& t) { return list_blocks(t.size); };
    launch_items<DenseTensor, kManyItems<DenseTensor>>(
        dense, a, &flush_list<DenseTensor, kManyItems<DenseTensor>>, blocks, stream);
    launch_items<AnyTensor, kManyItems<AnyTensor>>(
        any, a, &flush_list<AnyTensor, kManyItems<AnyTensor>>, blocks, stream);
  }
  // Tensors without elements have no block: their sums are zeros.
  void sum(const TensorSums& sums, int64_t count) const {
    for (double* tensors : sums.tensors)
      if (tensors)
        check(cudaMemsetAsync(tensors, 0, static_cast<size_t>(count) * sizeof(double), stream),
              "clearing sums");
    const auto one = [](const auto&) { return int64_t{1}; };
    launch_items<DenseTensor, kManyItems<DenseTensor>>(
        dense, sums, &sum_tensors<DenseTensor, kManyItems<DenseTensor>>, one, stream);
    launch_items<AnyTensor, kManyItems<AnyTensor>>(
        any, sums, &sum_tensors<AnyTensor, kManyItems<AnyTensor>>, one, stream);
  }

 private:
  template <bool kBf16, int kItems, class Item>
  void accumulate(const std::vector<Item>& items, const AccumulateArgs& a) const {
    launch_items<Item, kItems>(
        items, a, &accumulate_list<kBf16, Item, kItems>,
        [](const Item& t) { return list_blocks(t.size); }, stream);
  }
  template <bool kBf16, class Item>
  static bool has(const std::vector<Item>& items) {
    return std::any_of(items.begin(), items.end(),
                       [](const Item& t) { return (t.dtype(kBuffer) == DType::bf16) == kBf16; });
  }
};

bool has_penalty(const TensorList& list) {
  return std::any_of(list.tensors, list.tensors + list.count,
                     [](const ListTensor& t) { return t.l1 != 0 || t.l2 != 0; });
}

}  // namespace

// Both sums of every block, then of every tensor.
int64_t list_workspace_bytes(int64_t tensors, int64_t blocks) {
  return 2 * (tensors + blocks) * static_cast<int64_t>(sizeof(double));
}

void run_accumulate(const Queue& queue, AccumulateArgs a, double* squares) {
  const Items items(a.list, stream_of(queue));
  a.squares = squares ? static_cast<double*>(queue.workspace) : nullptr;
  items.accumulate(a);
  if (squares) items.sum({{a.squares, nullptr}, {squares, nullptr}}, a.list.count);
}

void run_flush(const Queue& queue, FlushArgs a, double max_norm, double* stats, double* squares) {
  const Items items(a.list, stream_of(queue));
  const bool penalises = has_penalty(a.list), clips = max_norm < (double)__builtin_inff();
  double* const blocks = static_cast<double*>(queue.workspace);
  double* const tensors = blocks + 2 * a.list.blocks;
  a.squares = blocks;
  a.penalties = penalises ? blocks + a.list.blocks : nullptr;
  a.clip = nullptr;
  a.write = !clips;
  items.flush(a);
  double* const penalties = penalises ? tensors + a.list.count : nullptr;
  if (!squares) squares = tensors;
  items.sum({{a.squares, a.penalties}, {squares, penalties}}, a.list.count);
  check(launch(&list_stats, Stats{squares, penalties, a.list.count, max_norm, stats}, 1,
               kListThreads, 1, kListSharedBytes, items.stream),
        "launching the statistics of a flush");
  if (!clips) return;
  a.squares = a.penalties = nullptr;
  a.clip = stats + kClip;
  a.write = true;
  items.flush(a);
}

}  // namespace mbk::MBK_ISA
