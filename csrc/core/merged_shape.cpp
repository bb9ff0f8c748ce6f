#include "core/merged_shape.h"

#include <utility>

namespace mbk {

namespace {

struct Dims {
  Walk& walk;
  View* views;
  int count;

  void swap(int d, int e) {
    std::swap(walk.shape[d], walk.shape[e]);
    for (int v = 0; v < count; ++v) std::swap(views[v].strides[d], views[v].strides[e]);
  }
  // Whether one step of dimension d is a walk through all of dimension e, in every view.
  bool are_one(int d, int e) const {
    for (int v = 0; v < count; ++v)
      if (views[v].data && views[v].strides[d] != views[v].strides[e] * walk.shape[e]) return false;
    return true;
  }
  void merge(int d, int e) {
    walk.shape[d] *= walk.shape[e];
    for (int v = 0; v < count; ++v) views[v].strides[d] = views[v].strides[e];
  }
};

}  // namespace

void merge_dims(Walk& a, View* views, int count) {
  Dims all{a, views, count};
  int dims = 0;
  for (int d = 0; d < a.dims; ++d)
    if (a.shape[d] != 1) {
      if (d != dims) all.swap(d, dims);
      ++dims;
    }
  const View& first = views[0];
  for (int d = 1; d < dims; ++d)
    for (int e = d; e > 0 && first.strides[e - 1] < first.strides[e] && first.strides[e - 1] != 0;
         --e)
      all.swap(e - 1, e);
  int merged = 0;
  for (int d = 1; d < dims; ++d) {
    if (all.are_one(merged, d)) {
      all.merge(merged, d);
    } else if (++merged != d) {
      all.swap(merged, d);
    }
  }
  a.dims = dims > 0 ? merged + 1 : 1;
  if (dims == 0) {
    a.shape[0] = a.size;  // 1, or 0 for an empty tensor
    for (int v = 0; v < count; ++v) views[v].strides[0] = 1;
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
