#include "cpu/pointwise_call.h"

#include "core/environment.h"
#include "core/merged_shape.h"
#include "core/ordered_sum.h"

namespace mbk {
namespace {

double sum_of_weights(const Backend& backend, const PointwiseArgs& args, DType type) {
  PointwiseArgs a = args;
  const double times = keep_distinct_weights(a);
  if (type == DType::f64) {
    const View& weight = a.views[kLosses];
    const double* values = static_cast<const double*>(weight.data);
    return times * host::ordered_sum(
                       a.size, [&](int64_t i) { return values[host::view_offset(a, weight, i)]; });
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
