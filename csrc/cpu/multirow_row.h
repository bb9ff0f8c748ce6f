#pragma once
// One row of one tensor of an item: any stride and dtype, read and written in blocks.
#include "core/multirow_items.h"
#include "core/row_items.h"

namespace mbk::MBK_ISA {
namespace {

template <class T, class S>
MBK_PASS void read_columns(T* to, const S* from, int64_t stride, int64_t n) {
  int64_t j = 0;
  if constexpr (sizeof(T) == sizeof(Compute<S>)) {
    if (stride == 1)
      for (; j + lanes<Vector<T>> <= n; j += lanes<Vector<T>>)
        store(to + j, load<Vector<T>>(from + j));
  }
  for (; j < n; ++j) to[j] = (T)widen(from[j * stride]);
}

// to = from or, with kAccumulate, to += from. The values have canonical NaNs.
template <bool kAccumulate, class T, class S>
MBK_PASS void write_columns(S* to, int64_t stride, const T* from, int64_t n) {
  int64_t j = 0;
  if constexpr (sizeof(T) == sizeof(Compute<S>)) {
    if (stride == 1) {
      for (; j + lanes<Vector<T>> <= n; j += lanes<Vector<T>>) {
        auto v = load<Vector<T>>(from + j);
        if constexpr (kAccumulate) v = canonical(load<Vector<T>>(to + j) + v);
        store(to + j, v);
      }
    }
  }
  for (; j < n; ++j) {
    Compute<S> v = computed_as<S>(from[j]);
    if constexpr (kAccumulate) v = canonical((Compute<S>)(widen(to[j * stride]) + v));
    to[j * stride] = narrow<S>(v);
  }
}

// A row of one tensor, in blocks of T: in place where it is dense and of that type, else in a
// buffer.
template <class T>
struct RowOf {
  char* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  int64_t stride = 0;
  bool direct = false;
  int64_t loaded = -1;          // the block that the buffer holds; -1: none
  bool has_tail = false;        // the partial group has been copied
  const char* ahead = nullptr;  // a dense row that comes later, to be fetched

  MBK_FN void open(const RowTensor& t, const ItemPosition& at, bool may_be_direct) {
    data = nullptr, loaded = -1, has_tail = false, ahead = nullptr;
    if (!t.data) return;
    dtype = t.dtype, stride = t.strides.column;
    const int64_t offset = at.offset(t.strides);
    with_storage(dtype,
                 [&](auto* type) { data = (char*)((StorageOf<decltype(type)>*)t.data + offset); });
    direct = may_be_direct && stride == 1 && dtype == kDTypeOf<T>;
  }
  // Has the row of t at a later item fetched while this one is read or written.
  MBK_FN void fetch(const RowTensor& t, const ItemPosition& later) {
    if (!data || stride != 1) return;
    with_storage(dtype, [&](auto* type) {
      ahead = (const char*)((const StorageOf<decltype(type)>*)t.data + later.offset(t.strides));
    });
  }
  // Columns [begin, begin + n) of it; the row itself is not direct.
  MBK_FN void fetch_block(int64_t begin, int64_t n) const {
    if (!ahead || lanes<Vector<T>> == 1) return;
    with_storage(dtype, [&](auto* type) {
      constexpr int64_t kSize = sizeof *type;
      for (int64_t at = begin * kSize; at < (begin + n) * kSize; at += 64)
        __builtin_prefetch(ahead + at, 0, 2);
    });
  }
  MBK_FN T value(int64_t j) const {
    T x = 0;
    with_storage(dtype, [&](auto* type) {
      x = (T)widen(((const StorageOf<decltype(type)>*)data)[j * stride]);
    });
    return x;
  }
  MBK_PASS void read(T* to, int64_t begin, int64_t n) const {
    with_storage(dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      read_columns(to, (const S*)data + begin * stride, stride, n);
    });
  }
  MBK_PASS void write(const T* from, int64_t begin, int64_t n, bool accumulate) const {
    with_storage(dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      S* const to = (S*)data + begin * stride;
      accumulate ? write_columns<true>(to, stride, from, n)
                 : write_columns<false>(to, stride, from, n);
    });
  }
  // One column: value, or old + value.
  MBK_FN void put(int64_t j, T value, bool accumulate, T old) const {
    with_storage(dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      Compute<S> v = computed_as<S>(value);
      if (accumulate) v = (Compute<S>)old + v;
      ((S*)data)[j * stride] = narrow<S>(canonical(v));
    });
  }
};

}  // namespace
}  // namespace mbk::MBK_ISA
