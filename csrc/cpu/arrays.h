#pragma once
// Small operations on dense arrays that torch also has; ours because they work in a forked child,
// where torch's thread pool hangs, and store one NaN.
#include <stdint.h>

#include "core/args.h"

namespace mbk {

// x = x * factor, in the type that x is computed in, rounded once.
void scale_array(void* x, DType dtype, int64_t n, double factor, int threads);

// to = from, rounded once.
void convert_array(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t n,
                   int threads);

}  // namespace mbk
