#pragma once
// Columns of a row, several of a thread at once: all loads are under way before the first is
// needed.
#include "core/multirow_items.h"
#include "cuda/packed.cuh"
#include "cuda/row_launch.cuh"

namespace mbk::MBK_ISA {

inline constexpr int kWarp = 32;

MBK_FN int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// narrow(canonical(x)), in fewer instructions.
template <class S>
MBK_DEVICE S narrowed(Compute<S> x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 2) {
    constexpr uint16_t kNan = __is_same(S, bf16) ? 0x7fc0 : 0x7e00;
    return {x != x ? kNan : (uint16_t)pack_pair<S>(x, 0)};
  }
#endif
  return narrow<S>(canonical(x));
}

template <class T>
MBK_DEVICE T read_column(const RowTensor& t, int64_t offset) {
  T x = 0;
  with_type<sizeof(T) == 8>(t.dtype, [&](auto* type) {
    x = (T)widened(((const StorageOf<decltype(type)>*)t.data)[offset]);
  });
  return x;
}
// A gradient, or old + gradient, as on the CPU.
template <class S, class T>
MBK_DEVICE void write_element(S* to, T g, bool accumulate) {
  Compute<S> v = computed_as<S>(g);
  if (accumulate) v = widened(*to) + v;
  *to = narrowed<S>(v);
}
template <class T>
MBK_DEVICE void write_column(const RowTensor& t, int64_t offset, T g, bool accumulate) {
  with_type<sizeof(T) == 8>(t.dtype, [&](auto* type) {
    write_element((StorageOf<decltype(type)>*)t.data + offset, g, accumulate);
  });
}

// A thread's columns of a block of columns, every kWarp-th from its number in its warp on: kCount
// of them from the block's column `from`, or as many as there are of `size`. kDense: they are
// neighbours in memory, so that the steps between them are part of the instructions. Bits of a mask
// are columns.
template <int kCount, bool kDense>
struct Columns {
  static constexpr int count = kCount;
  static constexpr uint32_t kAll = (1u << kCount) - 1;
  int64_t first;  // of the row
  int in_block;
  uint32_t inside;

  MBK_DEVICE Columns(int64_t begin, int from, int size)
      : in_block(from + threadIdx.x % kWarp), inside(kAll) {
    first = begin + in_block;
    const int left = size - in_block;
    if (left <= (kCount - 1) * kWarp) inside = left <= 0 ? 0 : (2u << (left - 1) / kWarp) - 1;
  }
  MBK_DEVICE int64_t column(int k) const { return first + k * kWarp; }
  MBK_DEVICE bool has(int k) const { return inside >> k & 1; }
  // A column of the block, as a bit of the mask; 0 if it is none of these.
  MBK_DEVICE uint32_t bit(int column) const {
    const uint32_t away = (uint32_t)(column - in_block);
    return away < kCount * kWarp && away % kWarp == 0 ? 1u << away / kWarp : 0;
  }
  template <class S>
  MBK_DEVICE S* element(char* row, int64_t stride, int k) const {
    return kDense ? (S*)row + first + k * kWarp : (S*)row + column(k) * stride;
  }
};

// A row of an item.
struct ItemRow {
  const RowTensor& tensor;
  int64_t before;  // bytes
  MBK_DEVICE char* data() const { return (char*)tensor.data + before; }
};

// All columns are asked for before one is looked at. Those that are not there are `outside`.
template <class S, int kCount, bool kDense, class T>
MBK_DEVICE void read_as(const ItemRow& row, const Columns<kCount, kDense>& columns, T outside,
                        T (&x)[kCount]) {
  const int64_t stride = row.tensor.strides.column;
  S stored[kCount];
  const S* const from = columns.template element<const S>(row.data(), 0, 0);
  if (kDense && columns.inside == columns.kAll) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) stored[k] = from[k * kWarp];
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = (T)widened(stored[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      stored[k] = S{};
      if (columns.has(k)) stored[k] = *columns.template element<const S>(row.data(), stride, k);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = columns.has(k) ? (T)widened(stored[k]) : outside;
  }
}
template <int kCount, bool kDense, class T>
MBK_DEVICE void read_columns(const ItemRow& row, const Columns<kCount, kDense>& columns, T outside,
                             T (&x)[kCount]) {
  with_type<sizeof(T) == 8>(row.tensor.dtype, [&](auto* type) {
    read_as<StorageOf<decltype(type)>>(row, columns, outside, x);
  });
}
// Those of the mask: gradients, or old + gradient where they are accumulated, as on the CPU; dense
// ones are accumulated in T only.
template <int kCount, bool kDense, class T>
MBK_DEVICE void write_columns(const ItemRow& row, const Columns<kCount, kDense>& columns,
                              uint32_t mask, bool accumulate, T (&x)[kCount]) {
  const int64_t stride = row.tensor.strides.column;
  if (kDense && accumulate) {
    T old[kCount];
    read_as<T>(row, columns, (T)0, old);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = old[k] + x[k];
  }
  with_type<sizeof(T) == 8>(row.tensor.dtype, [&](auto* type) {
    typedef StorageOf<decltype(type)> S;
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (mask >> k & 1)
        write_element(columns.template element<S>(row.data(), stride, k), x[k],
                      !kDense && accumulate);
  });
}

// One number in every column of a dense row, 16 bytes at a time; by the whole block of threads.
template <class S>
MBK_DEVICE void fill_row(S* to, int64_t columns, S value) {
  constexpr int kCount = 16 / sizeof(S);
  struct alignas(16) Vector {
    S element[kCount];
  } vector;
#pragma unroll
  for (int k = 0; k < kCount; ++k) vector.element[k] = value;
  const int64_t before = (int64_t)(-(uintptr_t)to % 16 / sizeof(S));
  const int64_t head = before < columns ? before : columns;
  const int64_t vectors = (columns - head) / kCount, tail = head + vectors * kCount;
  Vector* const aligned = (Vector*)(to + head);
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < vectors; n += blockDim.x) aligned[n] = vector;
  if (threadIdx.x < head) to[threadIdx.x] = value;
  if (threadIdx.x < columns - tail) to[tail + threadIdx.x] = value;
}

}  // namespace mbk::MBK_ISA
