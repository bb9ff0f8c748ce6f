#include "core/merged_shape.h"

#include <utility>

namespace mbk {

namespace {

void swap_dims(PointwiseArgs& a, int d, int e) {
  std::swap(a.shape[d], a.shape[e]);
  for (View& v : a.views) std::swap(v.strides[d], v.strides[e]);
}

}  // namespace

void merge_dims(PointwiseArgs& a) {
  int dims = 0;
  for (int d = 0; d < a.dims; ++d)
    if (a.shape[d] != 1) {
      if (d != dims) swap_dims(a, d, dims);
      ++dims;
    }
  for (int d = 1; d < dims; ++d)
    for (int e = d; e > 0 && a.views[kInput].strides[e - 1] < a.views[kInput].strides[e] &&
                    a.views[kInput].strides[e - 1] != 0;
         --e)
      swap_dims(a, e - 1, e);
  int merged = 0;
  for (int d = 1; d < dims; ++d) {
    bool one = true;
    for (const View& v : a.views)
      one = one && (!v.data || v.strides[merged] == v.strides[d] * a.shape[d]);
    if (one) {
      a.shape[merged] *= a.shape[d];
      for (View& v : a.views) v.strides[merged] = v.strides[d];
    } else if (++merged != d) {
      swap_dims(a, merged, d);
    }
  }
  a.dims = dims > 0 ? merged + 1 : 1;
  if (dims == 0) {
    a.shape[0] = a.size;  // 1, or 0 for an empty tensor
    for (View& v : a.views) v.strides[0] = 1;
  }
}

double keep_distinct_weights(PointwiseArgs& a) {
  View weight = a.views[kWeight];
  double times = 1;
  int dims = 0;
  a.size = 1;
  for (int d = 0; d < a.dims; ++d) {
    if (weight.strides[d] == 0) {
      times *= static_cast<double>(a.shape[d]);
    } else {
      a.shape[dims] = a.shape[d];
      weight.strides[dims++] = weight.strides[d];
      a.size *= a.shape[d];
    }
  }
  if (dims == 0) a.shape[dims] = 1, weight.strides[dims++] = 1;
  for (View& v : a.views) v.data = nullptr;
  a.dims = dims;
  a.views[kLosses] = weight;
  return times;
}

}  // namespace mbk
