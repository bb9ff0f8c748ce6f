#pragma once
// The one interface between the kernels and everything else: a table of functions per instruction
// set. Each tier's table is the only symbol that the objects of its tier export.
#include <stdint.h>

#include "core/args.h"

namespace mbk {

struct AccumulateArgs;  // core/tensor_list.h
struct FlushArgs;
struct ProductArgs;  // core/product_args.h

using RowFn = void (*)(const RowArgs&);
using PointwiseFn = void (*)(const PointwiseArgs&);
using MultirowFn = void (*)(const MultirowArgs&);

// An elementary function over an array, for the self-test and the exhaustive accuracy test.
struct Elementary {
  const char* name;
  void (*f32)(const float* x, float* y, int64_t n);
  void (*f64)(const double* x, double* y, int64_t n);
};

struct Backend {
  const char* name;
  RowFn (*row)(int loss, DType input);             // loss: its position in RowLosses
  PointwiseFn (*pointwise)(int loss, DType type);  // type: computed in, f32 or f64
  void (*sum)(const PointwiseArgs&);               // of the view kLosses: exactly, into totals
  const Elementary* elementary;                    // ends with a null name
  MultirowFn (*multirow)(int loss, DType type);    // type: computed in, f32 or f64
  bool (*product)(const ProductArgs&);             // false where there is none of these types
  void (*accumulate)(const AccumulateArgs&);
  void (*flush)(const FlushArgs&);
};

namespace scalar {
extern const Backend backend;
}
namespace avx2 {
extern const Backend backend;
}
namespace avx512 {
extern const Backend backend;
}

}  // namespace mbk
