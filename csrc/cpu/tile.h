#pragma once
// Tiles of items for short_rows.h: a vector per column with an item in each lane, read from and
// written to tensors of any layout and storage type.
#include "core/row_items.h"

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

template <class V, class S>
MBK_PASS void read_tile(V* tile, const S* from, const TilePlace<V>& at, int64_t columns,
                        int64_t stride) {
  if (at.adjacent) {
    from += at.offset[0];
    for (int64_t j = 0; j < columns; ++j) tile[j] = load<V>(from + j * stride);
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
        g = select(keep != V{}, old, old + g);
      }
      store(to + j * stride, canonical(g));
    }
  } else {
    const T* kept = (const T*)&keep;
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
}

}  // namespace
}  // namespace mbk::MBK_ISA
