#include "cuda/device.h"
#include "cuda/reduce.cuh"
#include "cuda/reduce_launch.h"
#include "cuda/row_plan.h"

namespace mbk::cuda {
namespace {

template <class T>
void run(const Queue& queue, int loss, DType input, RowArgs a, const Result& result) {
  const Device& device = current_device();
  Work work(queue, a.items);
  RowLaunch p{};
  p.work = work.state;
  p.errors = device.errors;
  p.result = result;
  const bool wants_weights =
      !a.from_state && result.reduction == Reduction::mean && !result.has_denominator;
  const bool weighted = a.target_is_index || a.sample_weight;
  if (!a.from_state)
    a.denominator = result.reduction != Reduction::mean ? Scalar{1, nullptr, DType::f64}
                    : result.has_denominator            ? result.denominator
                    : weighted ? Scalar{0, &work.state->divisor, DType::f64}
                               : Scalar{static_cast<double>(a.items), nullptr, DType::f64};
  const bool smooths_weights = a.label_smoothing != 0 && a.class_weight;
  a.class_weight_sum = smooths_weights
                           ? Scalar{0, &work.state->class_weight_sum, DType::f64}
                           : Scalar{static_cast<double>(a.columns), nullptr, DType::f64};
  const bool reduces =
      !a.from_state && ((result.reduction != Reduction::none && result.loss) || result.loss_sum);
  p.totals = reduces && sizeof(T) == 4;
  if (reduces && sizeof(T) == 8 && !a.losses) a.losses = work.losses;
  p.args = a;
  constexpr int64_t kFewItems = 1024;  // read by every block in less time than a launch takes
  p.weigh = wants_weights && weighted && sizeof(T) == 4 && a.items <= kFewItems;
  const bool reduce_weights = wants_weights && weighted && !p.weigh;
  const RowPlan plan = plan_rows(device, loss, input, p);

  if (plan.blocks > 1 || reduce_weights || smooths_weights || sizeof(T) == 8) work.clear();
  if (reduce_weights)
    launch_reduce<T>(work, ItemWeights<T>{a}, a.items, {&work.state->divisor, 1, nullptr, {}, {}});
  if (smooths_weights)
    launch_reduce<T>(work, Array<T>{static_cast<const T*>(a.class_weight)}, a.columns,
                     {&work.state->class_weight_sum, 1, nullptr, {}, {}});
  check(launch(plan.kernel, p, plan.blocks, plan.threads, plan.cluster, plan.shared_bytes,
               stream_of(queue)),
        "launching a row loss");
  if (reduces && sizeof(T) == 8)
    launch_reduce<T>(work, Array<T>{static_cast<const T*>(a.losses)}, a.items,
                     {nullptr, 1, nullptr, result, a.denominator});
}

}  // namespace

void run_row_loss(const Queue& queue, int loss, DType input, RowArgs args, const Result& result) {
  input == DType::f64 ? run<double>(queue, loss, input, args, result)
                      : run<float>(queue, loss, input, args, result);
}

}  // namespace mbk::cuda
