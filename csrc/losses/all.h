#pragma once
// Every loss, once. A loss's position in its list is its number in the tables and in the binding.
#include "losses/cross_entropy.h"
#include "losses/squared_error.h"

namespace mbk::MBK_ISA {

template <class... L>
struct LossList {
  static constexpr int size = sizeof...(L);
};
using RowLosses = LossList<CrossEntropy>;
using PointwiseLosses = LossList<HalfSquaredError, SquaredError>;

}  // namespace mbk::MBK_ISA
