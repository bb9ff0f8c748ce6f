#pragma once
// A whole call of an element-wise loss on the CPU: merge the dimensions, find the mean's divisor,
// run, reduce.
#include "core/backend.h"
#include "cpu/reduction.h"

namespace mbk {

// `args` as the caller sees it: shape, views, options; the rest is filled in here. `type` is what
// is computed in: f64 if any operand is. Returns the divisor that the gradient was divided by.
double run_pointwise_loss(const Backend& backend, int loss, DType type, PointwiseArgs args,
                          const Result& result);

}  // namespace mbk
