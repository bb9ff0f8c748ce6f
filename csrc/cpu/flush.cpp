// Buffers flushed into gradients, many tensors at once: scaled, regularised, measured, clipped and
// rounded to the gradient's type. Compiled once per ISA.
#include "core/backend.h"
#include "core/list_items.h"
#include "cpu/list_blocks.h"

namespace mbk::MBK_ISA {
namespace {

// The sums of a segment.
struct Sums {
  SegmentSum squares, penalties;
};

// Whole groups of lanes, from and to memory as it is. parameter: null without a penalty. grad: null
// where nothing is written.
template <bool kMeasures, bool kPenalty, class T, class S, class P>
MBK_FN void flush_groups(const Flush<T>& item, const ListTensor& t, const T* buffer,
                         const P* parameter, S* grad, int64_t count, Sums& sums) {
  typedef Vector<T> V;
  for (int64_t i = 0; i < count; i += kSumLanes) {
    for (int k = 0; k < kSumLanes; k += lanes<V>) {
      V v = load<V>(buffer + i + k), p = V{};
      if constexpr (kPenalty) {
        p = load<V>(parameter + i + k);
        v = item.regularised(v, p, (T)t.l1, (T)t.l2);
      } else {
        v = item.scaled(v);
      }
      if (grad) store(grad + i + k, item.clipped(v));
      if constexpr (kMeasures) {
        for (int part = 0; part < kParts<V>; ++part) {
          const int lane = k + part * lanes<f64v>;
          const auto d = to_double(v, part);
          sums.squares.add(lane, d * d);
          if constexpr (kPenalty)
            sums.penalties.add(lane, penalty_of(to_double(p, part), t.l1, t.l2));
        }
      }
    }
  }
}

// Elements of any layout and type, through arrays of T.
template <bool kMeasures, bool kPenalty, class T>
MBK_PASS void flush_segment(const Flush<T>& item, const ListTensor& t, int64_t begin, int count,
                            bool write, Sums& sums) {
  alignas(64) T buffer[kSegment], parameter[kSegment], grad[kSegment];
  const Range range{t, begin, count};
  const int whole = (count + kSumLanes - 1) / kSumLanes * kSumLanes;
  read_segment(t.views[kBuffer], range, buffer);
  if constexpr (kPenalty) read_segment(t.views[kListParameter], range, parameter);
  flush_groups<kMeasures, kPenalty>(item, t, buffer, parameter, write ? grad : nullptr, whole,
                                    sums);
  if (write) write_chunk<false>(t.views[kListGrad], range, grad);
}

// Elements [begin, end) of a tensor; the sums of whole blocks, where they are wanted.
template <bool kMeasures, bool kPenalty, class T, class S>
MBK_PASS void flush_blocks(const FlushArgs& a, const Flush<T>& item, const ListTensor& t,
                           int64_t begin, int64_t end, bool dense) {
  const View* const views = t.views;
  const T* const buffer = (const T*)views[kBuffer].data;
  const S* const parameter = (const S*)views[kListParameter].data;
  const bool write = a.write && views[kListGrad].data;
  S* const grad = (S*)views[kListGrad].data;
  int64_t block = t.first_block + begin / kListBlock;
  double squares[kSegments] = {}, penalties[kSegments] = {};
  for (int64_t i = begin; i < end;) {
    Sums sums;
    const int64_t stop = end - i < kSegment ? end : i + kSegment;
    const int64_t whole = dense ? (stop - i) / kSumLanes * kSumLanes : 0;
    flush_groups<kMeasures, kPenalty>(item, t, buffer + i, kPenalty ? parameter + i : nullptr,
                                      write ? grad + i : nullptr, whole, sums);
    if (i + whole < stop)
      flush_segment<kMeasures, kPenalty>(item, t, i + whole, (int)(stop - i - whole), write, sums);
    i = stop;
    if constexpr (kMeasures) {
      const int64_t segment = (stop - 1 - begin) % kListBlock / kSegment;
      squares[segment] = sums.squares.value();
      if constexpr (kPenalty) penalties[segment] = sums.penalties.value();
      if (stop == end || (stop - begin) % kListBlock == 0) {
        a.squares[block] = join_segments(squares);
        if (a.penalties) a.penalties[block] = join_segments(penalties);
        ++block;
        for (int s = 0; s < kSegments; ++s) squares[s] = penalties[s] = 0;
      }
    }
  }
}

template <bool kMeasures, bool kPenalty>
MBK_FN void flush_tensor(const FlushArgs& a, const Flush<float>& single, const Flush<double>& twice,
                         const ListTensor& t, int64_t begin, int64_t end) {
  const View& grad = t.views[kListGrad].data ? t.views[kListGrad] : t.views[kListParameter];
  const DType type = grad.data ? grad.dtype : t.views[kBuffer].dtype;
  const bool dense = t.dense() && (!kPenalty || t.views[kListParameter].dtype == type);
  if (t.views[kBuffer].dtype == DType::f64) {
    flush_blocks<kMeasures, kPenalty, double, double>(a, twice, t, begin, end,
                                                      dense && type == DType::f64);
  } else if (type == DType::bf16) {
    flush_blocks<kMeasures, kPenalty, float, bf16>(a, single, t, begin, end, dense);
  } else if (type == DType::f16) {
    flush_blocks<kMeasures, kPenalty, float, f16>(a, single, t, begin, end, dense);
  } else {
    flush_blocks<kMeasures, kPenalty, float, float>(a, single, t, begin, end,
                                                    dense && type == DType::f32);
  }
}

}  // namespace

void flush(const FlushArgs& a) {
  auto body = [&a](int64_t first_block, int64_t end_block, int) {
    const Flush<float> single(a);
    const Flush<double> twice(a);
    each_tensor(a.list, first_block, end_block,
                [&](const ListTensor& t, int64_t first, int64_t blocks) {
                  const int64_t begin = first * kListBlock, stop = begin + blocks * kListBlock;
                  const int64_t end = stop < t.size ? stop : t.size;
                  const bool penalty = t.l1 != 0 || t.l2 != 0;
                  if (a.squares)
                    penalty ? flush_tensor<true, true>(a, single, twice, t, begin, end)
                            : flush_tensor<true, false>(a, single, twice, t, begin, end);
                  else
                    penalty ? flush_tensor<false, true>(a, single, twice, t, begin, end)
                            : flush_tensor<false, false>(a, single, twice, t, begin, end);
                });
  };
  for_blocks(a.list, a.threads, body);
}

}  // namespace mbk::MBK_ISA
