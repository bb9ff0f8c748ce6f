// Gradients added into buffers, many tensors at once. Compiled once per ISA.
#include "core/backend.h"
#include "core/list_items.h"
#include "cpu/list_blocks.h"

namespace mbk::MBK_ISA {
namespace {

// Whole groups of lanes, from and to memory as it is.
template <bool kReads, bool kMeasures, class T, class S>
MBK_FN void add_groups(const Accumulation<T>& item, T* buffer, const S* grad, int64_t count,
                       SegmentSum& squares) {
  typedef Vector<T> V;
  for (int64_t i = 0; i < count; i += kSumLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kSumLanes; k += lanes<V>) {
      const V g = load<V>(grad + i + k);
      store(buffer + i + k, kReads ? item.of(load<V>(buffer + i + k), g) : item.of(g));
      if constexpr (kMeasures) {
        for (int part = 0; part < kParts<V>; ++part) {
          f64v& sum = squares.at(k + part * lanes<f64v>);
          sum = plus_square<T>(sum, to_double(g, part));
        }
      }
    }
  }
}

template <bool kMeasures, class T, class S>
MBK_FN void add_groups(const Accumulation<T>& item, T* buffer, const S* grad, int64_t count,
                       SegmentSum& squares) {
  if (item.reads)
    add_groups<true, kMeasures>(item, buffer, grad, count, squares);
  else
    add_groups<false, kMeasures>(item, buffer, grad, count, squares);
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

// Elements [begin, end) of a tensor; the sums of whole blocks.
template <bool kMeasures, class T, class S>
MBK_PASS void add_blocks(const Accumulation<T>& item, const ListTensor& t, int64_t begin,
                         int64_t end, bool dense, double* squares) {
  // Nothing is measured: a step is as long as the call.
  constexpr int64_t kStep = kMeasures ? kSegment : INT64_MAX;
  T* const buffer = (T*)t.views[kBuffer].data;
  const S* const grad = (const S*)t.views[kListGrad].data;
  double sums[kSegments] = {};
  for (int64_t i = begin; i < end;) {
    SegmentSum sum;
    int64_t stop = end - i < kStep ? end : i + kStep;
    if (dense) {
      const int64_t whole = (stop - i) / kSumLanes * kSumLanes, rest = stop - i - whole;
      add_groups<kMeasures>(item, buffer + i, grad + i, whole, sum);
      if (rest) add_rest<kMeasures>(item, buffer + i + whole, grad + i + whole, rest, sum);
    } else {
      for (int64_t s = i; s < stop; s += kSegment)
        add_segment<kMeasures>(item, t, s, stop - s < kSegment ? (int)(stop - s) : kSegment, sum);
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
