#pragma once
// Tiles of items for short_rows.h: a vector per column with an item in each lane, read from and
// written to tensors of any layout and storage type.
#include "core/row_items.h"
#include "cpu/copy_few.h"
#include "cpu/transpose.h"

namespace mbk::MBK_ISA {
namespace {

// Where up to a vector of consecutive items lie in one tensor.
template <class V>
struct TilePlace {
  int64_t offset[lanes<V>];
  int count;
  bool adjacent;  // a full vector of neighbours

  MBK_PASS TilePlace(const RowArgs& a, int64_t first, int n, const Strides& s)
      : count(n), adjacent(n == lanes<V>) {
    ItemPosition item(a, first);
    for (int l = 0; l < lanes<V>; ++l) {
      offset[l] = item.offset(s);
      adjacent = adjacent && offset[l] == offset[0] + l;
      if (l + 1 < n) item.advance(a);  // lanes without an item repeat the last
    }
  }
};

// The end of a row that is no whole vector, by way of a copy.
template <class S>
struct Padded {
  S value[64 / sizeof(S)];
};
template <class V, class S>
MBK_FN V load_first(const S* from, int count) {
  if (count == lanes<V>) return load<V>(from);
  Padded<S> padded;
  copy_group(padded.value, from, count, S{});
  return load<V>(padded.value);
}
template <class V, class S>
MBK_FN void store_first(S* to, V v, int count) {
  if (count == lanes<V>) return store(to, v);
  Padded<S> padded;
  store(padded.value, v);
  copy_few(to, padded.value, count);
}

template <class V, class S>
MBK_PASS void read_tile(V* tile, const S* from, const TilePlace<V>& at, int64_t columns,
                        int64_t stride) {
  if (at.adjacent) {
    from += at.offset[0];
    for (int64_t j = 0; j < columns; ++j) tile[j] = load<V>(from + j * stride);
#if MBK_SIMD
  } else if (stride == 1) {
    constexpr int n = lanes<V>;
    for (int64_t j = 0; j < columns; j += n) {
      const int used = columns - j < n ? (int)(columns - j) : n;
      V v[n];
      for (int l = 0; l < n; ++l) v[l] = load_first<V>(from + at.offset[l] + j, used);
      transpose(v);
      for (int k = 0; k < used; ++k) tile[j + k] = v[k];
    }
#endif
  } else {
    for (int l = 0; l < lanes<V>; ++l) {
      Element<V>* to = (Element<V>*)tile + l;
      const S* row = from + at.offset[l];
      for (int64_t j = 0; j < columns; ++j) to[j * lanes<V>] = widen(row[j * stride]);
    }
  }
}

// to = tile, or to += tile for the lanes with `keep` 0; canonical NaNs.
template <bool kAccumulate, class V, class S>
MBK_PASS void write_tile(S* to, V* tile, const TilePlace<V>& at, int64_t columns, int64_t stride,
                         V keep) {
  typedef Element<V> T;
  if (at.adjacent) {
    to += at.offset[0];
    for (int64_t j = 0; j < columns; ++j) {
      V g = tile[j];
      if constexpr (kAccumulate) {
        const V old = load<V>(to + j * stride);
        g = select(keep != V{}, old, canonical(old + g));  // also a NaN that is not ours is kept
      } else {
        g = canonical(g);
      }
      store(to + j * stride, g);
    }
    return;
  }
  const T* const kept = (const T*)&keep;
#if MBK_SIMD
  if (stride == 1) {
    constexpr int n = lanes<V>;
    for (int64_t j = 0; j < columns; j += n) {
      const int used = columns - j < n ? (int)(columns - j) : n;
      V v[n];
      for (int k = 0; k < n; ++k) v[k] = k < used ? tile[j + k] : V{};
      transpose(v);
      for (int l = 0; l < at.count; ++l) {
        if (kAccumulate && kept[l] != 0) continue;
        S* const row = to + at.offset[l] + j;
        if (kAccumulate) v[l] = load_first<V>((const S*)row, used) + v[l];
        store_first(row, canonical(v[l]), used);
      }
    }
    return;
  }
#endif
  for (int l = 0; l < at.count; ++l) {
    if (kAccumulate && kept[l] != 0) continue;
    const T* from = (const T*)tile + l;
    S* row = to + at.offset[l];
    for (int64_t j = 0; j < columns; ++j) {
      T g = from[j * lanes<V>];
      if (kAccumulate) g = widen(row[j * stride]) + g;
      row[j * stride] = narrow<S>(canonical(g));
    }
  }
}

}  // namespace
}  // namespace mbk::MBK_ISA
