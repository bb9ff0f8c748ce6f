#pragma once
// Views of any layout and storage type, a chunk at a time, as arrays of the type that is computed
// in.
#include "core/args.h"
#include "core/dtype.h"

namespace mbk::MBK_ISA {
namespace {

inline constexpr int kChunk = 512;  // of a few arrays of T in the first-level cache

// Elements [begin, begin + count) of a call, in the order of its merged shape.
struct Range {
  const Walk& args;
  int64_t begin;
  int count;

  // Calls f(offset in the view, first element, elements) for each run along the last dimension.
  template <class F>
  MBK_FN void runs(const View& view, F f) const {
    const int last = args.dims - 1;
    int64_t index[kMaxDims], rest = begin, offset = 0;
    for (int d = last; d >= 0; --d) {
      index[d] = rest % args.shape[d];
      rest /= args.shape[d];
      offset += index[d] * view.strides[d];
    }
    for (int done = 0; done < count;) {
      const int64_t left = args.shape[last] - index[last];
      const int run = left < count - done ? (int)left : count - done;
      f(offset, done, run);
      done += run;
      offset += run * view.strides[last];
      index[last] += run;
      for (int d = last; d > 0 && index[d] == args.shape[d]; --d) {
        offset += view.strides[d - 1] - index[d] * view.strides[d];
        index[d] = 0;
        ++index[d - 1];
      }
    }
  }
};

template <class T, class S>
MBK_PASS void read_as(const View& view, const Range& range, T* buffer) {
  const int64_t stride = view.strides[range.args.dims - 1];
  range.runs(view, [&](int64_t offset, int first, int run) {
    const S* from = (const S*)view.data + offset;
    int k = 0;
    if (stride == 1) {
      for (; k + lanes<Vector<T>> <= run; k += lanes<Vector<T>>) {
        if constexpr (sizeof(T) == sizeof(Compute<S>))
          store(buffer + first + k, load<Vector<T>>(from + k));
        else
          break;
      }
    }
    for (; k < run; ++k) buffer[first + k] = (T)widen(from[k * stride]);
  });
}

template <bool kAccumulate, class S, class T>
MBK_PASS void write_as(const View& view, const Range& range, const T* values) {
  const int64_t stride = view.strides[range.args.dims - 1];
  range.runs(view, [&](int64_t offset, int first, int run) {
    S* to = (S*)view.data + offset;
    int k = 0;
    if constexpr (sizeof(T) == sizeof(Compute<S>)) {
      if (stride == 1) {
        for (; k + lanes<Vector<T>> <= run; k += lanes<Vector<T>>) {
          auto v = load<Vector<T>>(values + first + k);
          if constexpr (kAccumulate) v = canonical(load<Vector<T>>(to + k) + v);
          store(to + k, v);
        }
      }
    }
    for (; k < run; ++k) {
      Compute<S> v = computed_as<S>(values[first + k]);
      if constexpr (kAccumulate) v = canonical((Compute<S>)(widen(to[k * stride]) + v));
      to[k * stride] = narrow<S>(v);
    }
  });
}

// The view's own memory where it can be used as it is: S, unit stride, whole vectors.
template <class S>
MBK_FN S* in_place(const View& view, const Range& range) {
  const bool direct = view.dtype == kDTypeOf<S> && range.args.dims == 1 && view.strides[0] == 1 &&
                      range.count % lanes<Vector<Compute<S>>> == 0;
  return direct ? (S*)view.data + range.begin : nullptr;
}

// The chunk as an array of T: in place, or copied to the buffer, whose last vector is padded with
// 0.
template <class T>
MBK_FN const T* read_chunk(const View& view, const Range& range, T* buffer) {
  if (const T* direct = in_place<T>(view, range)) return direct;
  for (int k = range.count / lanes<Vector<T>> * lanes<Vector<T>>;
       k < range.count + lanes<Vector<T>> && k < kChunk; ++k)
    buffer[k] = 0;
  switch (view.dtype) {
    case DType::f32:
      read_as<T, float>(view, range, buffer);
      break;
    case DType::bf16:
      read_as<T, bf16>(view, range, buffer);
      break;
    case DType::f16:
      read_as<T, f16>(view, range, buffer);
      break;
    default:
      read_as<T, double>(view, range, buffer);
  }
  return buffer;
}

// Values must have canonical NaNs.
template <bool kAccumulate, class T>
MBK_FN void write_chunk(const View& view, const Range& range, const T* values) {
  switch (view.dtype) {
    case DType::f32:
      write_as<kAccumulate, float>(view, range, values);
      break;
    case DType::bf16:
      write_as<kAccumulate, bf16>(view, range, values);
      break;
    case DType::f16:
      write_as<kAccumulate, f16>(view, range, values);
      break;
    default:
      write_as<kAccumulate, double>(view, range, values);
  }
}

}  // namespace
}  // namespace mbk::MBK_ISA
