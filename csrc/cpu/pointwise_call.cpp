#include "cpu/pointwise_call.h"

#include <algorithm>
#include <utility>

#include "core/environment.h"

namespace mbk {
namespace {

void swap_dims(PointwiseArgs& a, int d, int e) {
  std::swap(a.shape[d], a.shape[e]);
  for (View& v : a.views) std::swap(v.strides[d], v.strides[e]);
}

// Sorts dimensions by the strides of the input, outermost first, so that layouts such as
// channels_last are walked in the order of memory; drops those of size 1; merges those that are one
// in every view.
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

// The sum of the weights over the broadcast shape: the distinct ones, times how often each is used.
double sum_of_weights(const Backend& backend, PointwiseArgs a, DType type) {
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
  if (type == DType::f64) {
    double sum = 0;
    int64_t index[kMaxDims] = {};
    for (int64_t i = 0; i < a.size; ++i) {
      int64_t offset = 0;
      for (int d = 0; d < dims; ++d) offset += index[d] * weight.strides[d];
      sum += static_cast<const double*>(weight.data)[offset];
      for (int d = dims - 1; d >= 0 && ++index[d] == a.shape[d]; --d) index[d] = 0;
    }
    return sum * times;
  }
  ThreadTotals totals(a.threads);
  a.totals = totals.data();
  backend.sum(a);
  return exact_value(totals.merged()) * times;
}

}  // namespace

double run_pointwise_loss(const Backend& backend, int loss, DType type, PointwiseArgs a,
                          const Result& result) {
  const DefaultEnvironment environment;
  a.size = 1;
  for (int d = 0; d < a.dims; ++d) a.size *= a.shape[d];
  merge_dims(a);

  double weights = static_cast<double>(a.size);
  const bool needs_weights = result.reduction == Reduction::mean && !result.has_denominator;
  if (needs_weights && a.views[kWeight].data && a.size > 0)
    weights = sum_of_weights(backend, a, type);
  const double divisor = divisor_of(result, weights);
  a.denominator = {divisor, nullptr, DType::f64};
  // Read before anything is written: it may lie in the gradient's memory.
  a.scale = {read_scalar(a.scale), nullptr, DType::f64};

  const bool reduces = (result.reduction != Reduction::none && result.loss) || result.loss_sum;
  ThreadTotals totals(a.threads);
  std::vector<double> partial;
  if (reduces && type == DType::f64) {
    partial.resize(static_cast<size_t>((a.size + kPointwiseBlock - 1) / kPointwiseBlock));
    a.partial_sums = partial.data();
  } else if (reduces) {
    a.totals = totals.data();
  }
  backend.pointwise(loss, type)(a);

  if (type == DType::f64) {
    double total = 0;
    for (const double block : partial) total += block;
    store_result(result, total, divisor);
  } else {
    const ExactSumState total = totals.merged();
    if (result.loss_sum) exact_merge(*result.loss_sum, total);
    store_result(result, total, divisor);
  }
  return divisor;
}

}  // namespace mbk
