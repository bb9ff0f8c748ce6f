#pragma once
// What the calls of element-wise losses share.
#include <array>

#include "core/args.h"
#include "python/tensor.h"

namespace mbk::python {

using Views = std::array<const Tensor*, kViews>;

// Shape and strides of a call, from its tensors, which are of one shape: dimensions of size 1 are
// dropped, and those merged that are one in every view. False if too many are left.
bool merge(const Views& views, PointwiseArgs& a);

}  // namespace mbk::python
