// Buffers flushed into gradients, many tensors at once: scaled, regularised, measured, clipped and
// rounded to the gradient's type. Compiled once per ISA.
#include "core/backend.h"
#include "core/list_items.h"
#include "cpu/list_blocks.h"

namespace mbk::MBK_ISA {
namespace {

enum class Penalty { none, l2, l1_l2 };

// The sums of a segment.
struct Sums {
  SegmentSum squares, penalties;
};

// Whole groups of lanes, from and to memory as it is. parameter: null without a penalty. grad: null
// where nothing is written. present: of a group that has padding whose product with the scale would
// be NaN, 1 for each element; else null.
template <bool kMeasures, Penalty kPenalty, class T, class S, class P>
MBK_FN void flush_groups(const Flush<T>& item, const ListTensor& t, const T* buffer,
                         const P* parameter, S* grad, int64_t count, Sums& sums,
                         const T* present = nullptr) {
  typedef Vector<T> V;
  const Flush<T> by = item;  // nothing that is written may be it
  const double l1 = t.l1, l2 = t.l2;
  const T l1_rounded = (T)l1, l2_rounded = (T)l2;
  for (int64_t i = 0; i < count; i += kSumLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kSumLanes; k += lanes<V>) {
      V v = load<V>(buffer + i + k), p = V{};
      if constexpr (kPenalty != Penalty::none) {
        p = load<V>(parameter + i + k);
        v = by.template regularised<kPenalty == Penalty::l1_l2>(v, p, l1_rounded, l2_rounded);
      } else {
        v = by.scaled(v);
      }
      if (present) v = select(load<V>(present + k) != V{}, v, V{});
      if (grad) store(grad + i + k, by.clipped(v));
      if constexpr (kMeasures) {
        for (int part = 0; part < kParts<V>; ++part) {
          const int lane = k + part * lanes<f64v>;
          f64v& squares = sums.squares.at(lane);
          squares = plus_square<T>(squares, to_double(v, part));
          if constexpr (kPenalty != Penalty::none) {
            const f64v d = to_double(p, part);
            f64v& penalties = sums.penalties.at(lane);
            penalties = kPenalty == Penalty::l2 ? plus_square<T>(penalties, d)
                                                : penalties + penalty_of(d, l1, l2);
          }
        }
      }
    }
  }
}

// Elements of any layout and type, through arrays of T.
template <bool kMeasures, Penalty kPenalty, class T>
MBK_PASS void flush_segment(const Flush<T>& item, const ListTensor& t, int64_t begin, int count,
                            bool write, Sums& sums) {
  alignas(64) T buffer[kSegment], parameter[kSegment], grad[kSegment];
  const Range range{t, begin, count};
  // Padding is 0 times the scale.
  const bool pads = abs(item.scale) < (T)__builtin_inff();
  const int whole = (pads ? count + kSumLanes - 1 : count) / kSumLanes * kSumLanes;
  read_segment(t.views[kBuffer], range, buffer);
  if (t.views[kListLow].data) {  // of a buffer of bf16: the sum is a pair
    read_segment(t.views[kListLow], range, grad);
    for (int k = 0; k < count; ++k) buffer[k] += grad[k];
  }
  if constexpr (kPenalty != Penalty::none) read_segment(t.views[kListParameter], range, parameter);
  flush_groups<kMeasures, kPenalty>(item, t, buffer, parameter, write ? grad : nullptr, whole,
                                    sums);
  if (whole < count) {
    T present[kSumLanes] = {};
    for (int k = 0; k < count - whole; ++k) present[k] = 1;
    flush_groups<kMeasures, kPenalty>(item, t, buffer + whole, parameter + whole,
                                      write ? grad + whole : nullptr, kSumLanes, sums, present);
  }
  if (write) write_chunk<false>(t.views[kListGrad], range, grad);
}

// Elements [begin, end) of a tensor; the sums of whole blocks, where they are wanted.
template <bool kMeasures, Penalty kPenalty, class T, class S>
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
    flush_groups<kMeasures, kPenalty>(item, t, buffer + i,
                                      kPenalty != Penalty::none ? parameter + i : nullptr,
                                      write ? grad + i : nullptr, whole, sums);
    if (i + whole < stop)
      flush_segment<kMeasures, kPenalty>(item, t, i + whole, (int)(stop - i - whole), write, sums);
    i = stop;
    if constexpr (kMeasures) {
      const int64_t segment = (stop - 1 - begin) % kListBlock / kSegment;
      squares[segment] = sums.squares.value();
      if constexpr (kPenalty != Penalty::none) penalties[segment] = sums.penalties.value();
      if (stop == end || (stop - begin) % kListBlock == 0) {
        a.squares[block] = join_segments(squares);
        if (a.penalties) a.penalties[block] = block_penalty(join_segments(penalties), t.l1, t.l2);
        ++block;
        for (int s = 0; s < kSegments; ++s) squares[s] = penalties[s] = 0;
      }
    }
  }
}

template <bool kMeasures, Penalty kPenalty>
MBK_FN void flush_tensor(const FlushArgs& a, const Flush<float>& single, const Flush<double>& twice,
                         const ListTensor& t, int64_t begin, int64_t end) {
  const View& grad = t.views[kListGrad].data ? t.views[kListGrad] : t.views[kListParameter];
  const DType type = grad.data ? grad.dtype : t.views[kBuffer].dtype;
  const bool dense = t.dense() && t.views[kBuffer].dtype != DType::bf16 &&
                     (kPenalty == Penalty::none || t.views[kListParameter].dtype == type);
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

template <bool kMeasures>
MBK_FN void flush_range(const FlushArgs& a, const Flush<float>& single, const Flush<double>& twice,
                        const ListTensor& t, int64_t begin, int64_t end) {
  if (t.l1 != 0)
    flush_tensor<kMeasures, Penalty::l1_l2>(a, single, twice, t, begin, end);
  else if (t.l2 != 0)
    flush_tensor<kMeasures, Penalty::l2>(a, single, twice, t, begin, end);
  else
    flush_tensor<kMeasures, Penalty::none>(a, single, twice, t, begin, end);
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
                  a.squares ? flush_range<true>(a, single, twice, t, begin, end)
                            : flush_range<false>(a, single, twice, t, begin, end);
                });
  };
  for_blocks(a.list, a.threads, body);
}

}  // namespace mbk::MBK_ISA
