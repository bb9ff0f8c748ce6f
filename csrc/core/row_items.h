#pragma once
// Per-item addressing and factors of row losses, shared by every driver.
#include "core/args.h"
#include "core/dtype.h"

namespace mbk::MBK_ISA {

// Columns are summed in aligned blocks of kBlock. In a block, column j belongs to lane j % kGroup;
// each lane adds its columns in order, lanes are joined by halves, blocks by an exact sum (fp64: in
// order).
inline constexpr int kGroup = 64;
inline constexpr int64_t kBlock = 1024;

struct ItemPosition {
  int64_t outer, inner;
  MBK_FN ItemPosition(const RowArgs& a, int64_t item)
      : outer(a.inner_size == 1 ? item : item / a.inner_size),
        inner(a.inner_size == 1 ? 0 : item - outer * a.inner_size) {}
  MBK_FN int64_t offset(const Strides& s) const { return outer * s.outer + inner * s.inner; }
  MBK_FN void advance(const RowArgs& a) {  // to the next item, without a division
    if (++inner == a.inner_size) {
      inner = 0;
      ++outer;
    }
  }
};

template <class T>
MBK_FN T item_value(const void* values, const Strides& strides, const ItemPosition& at) {
  return values ? ((const T*)values)[at.offset(strides)] : (T)1;
}

// The target class; -1 for an ignored item. The binding has checked that it is in range otherwise.
MBK_FN int64_t target_class(const RowArgs& a, int64_t index) {
  return index == a.ignore_index || (uint64_t)index >= (uint64_t)a.columns ? -1 : index;
}
MBK_FN int64_t item_target(const RowArgs& a, const ItemPosition& at) {
  return target_class(a, read_index(a.target, a.target_type, at.offset(a.target_strides)));
}

// The weight that an item has in the mean's divisor.
template <class T>
MBK_FN T item_weight(const RowArgs& a, int64_t item) {
  const ItemPosition at(a, item);
  T w = 1;
  if (a.target_is_index) {
    const int64_t target = item_target(a, at);
    if (target < 0) return 0;
    if (a.class_weight) w = ((const T*)a.class_weight)[target];
  }
  return w * item_value<T>(a.sample_weight, a.sample_weight_strides, at);
}

// d(result)/d(item's own loss), before the item's weight; the same order of operations everywhere.
template <class T>
struct ItemScale {
  double scale, denominator,
      common;  // common: of every item, if items have no factors of their own
  bool same;
  MBK_FN explicit ItemScale(const RowArgs& a) : ItemScale(a, read(a.denominator)) {}
  MBK_FN ItemScale(const RowArgs& a, double divisor)
      : scale(read(a.scale)),
        denominator(divisor),
        common(scale / denominator),
        same(!a.item_scale && !a.sample_weight) {}
  MBK_FN double operator()(const RowArgs& a, const ItemPosition& at) const {
    if (same) return common;
    return scale * (double)item_value<T>(a.item_scale, a.item_scale_strides, at) / denominator *
           (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
  }
};

}  // namespace mbk::MBK_ISA
