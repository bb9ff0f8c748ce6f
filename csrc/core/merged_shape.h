#pragma once
// The shape that an element-wise call is walked in; host code, for every device.
#include "core/args.h"
#include "core/lane.h"

namespace mbk {

// Sorts dimensions by the strides of the first view, outermost first, so that layouts such as
// channels_last are walked in the order of memory; drops those of size 1; merges those that are one
// in every view that has data.
void merge_dims(Walk& a, View* views, int count);
inline void merge_dims(PointwiseArgs& a) { merge_dims(a, a.views, kViews); }

// Leaves one view, kLosses: the weights that are distinct. Each is used as often as is returned.
double keep_distinct_weights(PointwiseArgs& a);

namespace MBK_ISA {

// Where element i of the merged shape lies in a view.
MBK_FN int64_t view_offset(const PointwiseArgs& a, const View& view, int64_t i) {
  int64_t offset = 0;
  for (int d = a.dims - 1; d > 0; --d) {
    offset += i % a.shape[d] * view.strides[d];
    i /= a.shape[d];
  }
  return offset + i * view.strides[0];
}

}  // namespace MBK_ISA
}  // namespace mbk
