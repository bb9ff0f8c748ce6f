// Gradients added into buffers, many tensors at once. Compiled once per ISA.
#include "core/backend.h"
#include "core/list_items.h"
#include "cpu/list_blocks.h"

namespace mbk::MBK_ISA {
namespace {

// What becomes of a buffer: overwritten, added to, or added to with factors other than 1.
enum class Sum { fresh, plain, scaled };

// Whole groups of lanes, from and to memory as it is.
template <Sum kSum, bool kMeasures, class T, class S>
MBK_FN void add_groups(const Accumulation<T>& item, T* buffer, const S* grad, int64_t count,
                       SegmentSum& squares) {
  typedef Vector<T> V;
  const Accumulation<T> by = item;  // nothing that is written may be it
  for (int64_t i = 0; i < count; i += kSumLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kSumLanes; k += lanes<V>) {
      const V g = load<V>(grad + i + k);
      V sum;
      if constexpr (kSum == Sum::fresh)
        sum = by.of(g);
      else if constexpr (kSum == Sum::plain)
        sum = canonical(load<V>(buffer + i + k) + g);
      else
        sum = by.of(load<V>(buffer + i + k), g);
      store(buffer + i + k, sum);
      if constexpr (kMeasures) {
        for (int part = 0; part < kParts<V>; ++part) {
          f64v& lane = squares.at(k + part * lanes<f64v>);
          lane = plus_square<T>(lane, to_double(g, part));
        }
      }
    }
  }
}

template <bool kMeasures, class T, class S>
MBK_FN void add_groups(const Accumulation<T>& item, T* buffer, const S* grad, int64_t count,
                       SegmentSum& squares) {
  if (!item.reads)
    add_groups<Sum::fresh, kMeasures>(item, buffer, grad, count, squares);
  else if (item.alpha == 1 && item.beta == 1)
    add_groups<Sum::plain, kMeasures>(item, buffer, grad, count, squares);
  else
    add_groups<Sum::scaled, kMeasures>(item, buffer, grad, count, squares);
}

// Fewer elements than a group of lanes, through a copy with zeros behind it.
template <bool kMeasures, class T, class S>
MBK_FN void add_rest(const Accumulation<T>& item, T* buffer, const S* grad, int64_t count,
                     SegmentSum& squares) {
  alignas(64) T padded[kSumLanes] = {};
  alignas(64) S added[kSumLanes] = {};
  if (item.reads) memcpy(padded, buffer, (size_t)count * sizeof(T));
  memcpy(added, grad, (size_t)count * sizeof(S));
  add_groups<kMeasures>(item, padded, added, kSumLanes, squares);
  memcpy(buffer, padded, (size_t)count * sizeof(T));
}

// Elements of any layout and type, through arrays of T.
template <bool kMeasures, class T>
MBK_PASS void add_segment(const Accumulation<T>& item, const ListTensor& t, int64_t begin,
                          int count, SegmentSum& squares) {
  alignas(64) T buffer[kSegment], grad[kSegment];
  const Range range{t, begin, count};
  const int whole = (count + kSumLanes - 1) / kSumLanes * kSumLanes;
  if (item.reads) read_segment(t.views[kBuffer], range, buffer);
  read_segment(t.views[kListGrad], range, grad);
  add_groups<kMeasures>(item, buffer, grad, whole, squares);
  write_chunk<false>(t.views[kBuffer], range, buffer);
}

// The same into bf16.
template <bool kMeasures>
MBK_PASS void add_segment(const Bf16Accumulation& item, const ListTensor& t, int64_t begin,
                          int count, SegmentSum& squares) {
  alignas(64) float buffer[kSegment] = {}, low[kSegment] = {}, grad[kSegment];
  const Range range{t, begin, count};
  const bool is_pair = t.views[kListLow].data;
  const RandomBits random(t.key);
  if (item.item.reads) {
    read_segment(t.views[kBuffer], range, buffer);
    if (is_pair) read_segment(t.views[kListLow], range, low);
  }
  read_segment(t.views[kListGrad], range, grad);
  typedef Vector<float> V;
  for (int i = 0; i < count; i += kSumLanes) {
#pragma GCC unroll 8
    for (int k = i; k < i + kSumLanes; k += lanes<V>) {
      const V g = load<V>(grad + k);
      V b = load<V>(buffer + k), l = load<V>(low + k);
      if (is_pair) {
        item.paired(b, l, g);
        store(low + k, l);
      } else {
        b = item.by_chance(b, g, (Int<V>)(random.at<V>(begin + k) >> 16));
      }
      store(buffer + k, b);
      if constexpr (kMeasures) {
        for (int part = 0; part < kParts<V>; ++part) {
          f64v& sum = squares.at(k % kSumLanes + part * lanes<f64v>);
          sum = plus_square<float>(sum, to_double(g, part));
        }
      }
    }
  }
  write_chunk<false>(t.views[kBuffer], range, buffer);
  if (is_pair) write_chunk<false>(t.views[kListLow], range, low);
}

// Elements [begin, end) of a tensor; the sums of whole blocks. Item: an Accumulation<T>, or that of
// bf16, which takes no other way than that of segments.
template <bool kMeasures, class T, class S, class Item>
MBK_PASS void add_blocks(const Item& item, const ListTensor& t, int64_t begin, int64_t end,
                         bool dense, double* squares) {
  constexpr bool kBf16 = __is_same(Item, Bf16Accumulation);
  // Nothing is measured: a step is as long as the call.
  constexpr int64_t kStep = kMeasures ? kSegment : INT64_MAX;
  T* const buffer = (T*)t.views[kBuffer].data;
  const S* const grad = (const S*)t.views[kListGrad].data;
  double sums[kSegments] = {};
  for (int64_t i = begin; i < end;) {
    SegmentSum sum;
    int64_t stop = end - i < kStep ? end : i + kStep;
    if (kBf16 || !dense) {
      for (int64_t s = i; s < stop; s += kSegment)
        add_segment<kMeasures>(item, t, s, stop - s < kSegment ? (int)(stop - s) : kSegment, sum);
    } else if constexpr (!kBf16) {
      const int64_t whole = (stop - i) / kSumLanes * kSumLanes, rest = stop - i - whole;
      add_groups<kMeasures>(item, buffer + i, grad + i, whole, sum);
      if (rest) add_rest<kMeasures>(item, buffer + i + whole, grad + i + whole, rest, sum);
    }
    i = stop;
    if constexpr (kMeasures) {
      sums[(stop - 1 - begin) % kListBlock / kSegment] = sum.value();
      if (stop == end || (stop - begin) % kListBlock == 0) {
        *squares++ = join_segments(sums);
        for (double& s : sums) s = 0;
      }
    }
  }
}

template <bool kMeasures>
MBK_FN void add_tensor(const AccumulateArgs& a, const Accumulation<float>& single,
                       const Accumulation<double>& twice, const ListTensor& t, int64_t first,
                       int64_t blocks) {
  const int64_t begin = first * kListBlock, stop = begin + blocks * kListBlock;
  const int64_t end = stop < t.size ? stop : t.size;
  double* const squares = kMeasures ? a.squares + t.first_block + first : nullptr;
  const bool dense = t.dense();
  const DType grad = t.views[kListGrad].dtype;
  if (t.views[kBuffer].dtype == DType::f64) {
    add_blocks<kMeasures, double, double>(twice, t, begin, end, dense && grad == DType::f64,
                                          squares);
  } else if (t.views[kBuffer].dtype == DType::bf16) {
    add_blocks<kMeasures, float, float>(Bf16Accumulation{single}, t, begin, end, false, squares);
  } else if (grad == DType::bf16) {
    add_blocks<kMeasures, float, bf16>(single, t, begin, end, dense, squares);
  } else if (grad == DType::f16) {
    add_blocks<kMeasures, float, f16>(single, t, begin, end, dense, squares);
  } else {
    add_blocks<kMeasures, float, float>(single, t, begin, end, dense, squares);
  }
}

}  // namespace

void accumulate(const AccumulateArgs& a) {
  auto body = [&a](int64_t begin, int64_t end, int) {
    const Accumulation<float> single(a);
    const Accumulation<double> twice(a);
    each_tensor(a.list, begin, end, [&](const ListTensor& t, int64_t first, int64_t blocks) {
      if (a.squares)
        add_tensor<true>(a, single, twice, t, first, blocks);
      else
        add_tensor<false>(a, single, twice, t, first, blocks);
    });
  };
  for_blocks(a.list, a.threads, body);
}

}  // namespace mbk::MBK_ISA
