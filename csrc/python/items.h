#pragma once
// What the losses over rows of classes ask of a tensor.
#include "python/tensor.h"

namespace mbk::python {

// One value an item, in the type that the loss is computed in.
inline bool per_item(const Tensor& t, const Tensor& input, bool in_double, const void*& data,
                     Strides& strides) {
  if (!t) return true;
  data = t.data;
  const int dims = input.dims > 1 ? input.dims - 1 : 0;
  bool good = t.is(in_double ? DType::f64 : DType::f32) && t.dims == dims;
  for (int d = 0; good && d < dims; ++d) good = t.shape[d] == input.shape[d ? d + 1 : 0];
  return good && item_strides(t, false, strides);
}

// Contiguous output of a given type and size; absent is good too.
inline bool dense(const Tensor& t, bool in_double, std::int64_t n, void*& data) {
  data = t.data;
  return !t || (t.is(in_double ? DType::f64 : DType::f32) && t.numel() == n);
}

}  // namespace mbk::python
