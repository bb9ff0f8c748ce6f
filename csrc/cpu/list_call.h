#pragma once
// Whole calls over lists of tensors on the CPU: the kernels, then the sums of their blocks.
#include "core/backend.h"
#include "core/tensor_list.h"

namespace mbk {

// squares: of each tensor's gradient, or null.
void run_accumulate(const Backend& backend, AccumulateArgs args, double* squares);

// stats: kFlushStats numbers. squares: of each tensor's v, or null. max_norm: infinity where
// nothing is clipped.
void run_flush(const Backend& backend, FlushArgs args, double max_norm, double* stats,
               double* squares);

}  // namespace mbk
