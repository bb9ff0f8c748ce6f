#pragma once
// A whole call of a row loss on the CPU: check the targets, find the mean's divisor, run, reduce.
#include "core/backend.h"
#include "cpu/reduction.h"

namespace mbk {

// `args` as the caller sees it: scale, item_scale, tensors, options; the denominator, totals,
// scratch and class_weight_sum are filled in here. Returns the divisor that the gradient was
// divided by. Throws std::out_of_range, before anything is written, for a class index outside [0,
// columns).
double run_row_loss(const Backend& backend, int loss, DType input, RowArgs args,
                    const Result& result);

// Checks every class index, and returns the sum of the items' weights: the mean's divisor. Class
// and sample weights are of `type`.
double check_and_weigh(const RowArgs& args, DType type);

}  // namespace mbk
