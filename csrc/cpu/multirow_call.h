#pragma once
// A whole call of a loss of several rows an item on the CPU: check the targets, find the mean's
// divisor, run, reduce.
#include "core/backend.h"
#include "cpu/reduction.h"

namespace mbk {

// As run_row_loss: `args` as the caller sees it; the denominator, totals and scratch are filled in
// here. `type` is what is computed in: f64 if any row is. Returns the divisor that the gradients
// were divided by. Throws std::out_of_range, before anything is written, for a class index outside
// [0, columns).
double run_multirow_loss(const Backend& backend, int loss, DType type, MultirowArgs args,
                         const Result& result);

}  // namespace mbk
