#pragma once
// The kernels of every row loss for one storage type; included by one file a type.
#include "cuda/item_rows.cuh"
#include "cuda/row_plan.h"
#include "cuda/team_rows.cuh"
#include "losses/all.h"

namespace mbk::MBK_ISA {

// The others need too many registers.
template <class Loss, class In>
constexpr bool kCanReside = sizeof(In) <= 4 && Loss::kHasIndex && !Loss::kHasSoftcap;

template <class Loss, class In>
RowKernels kernels_of() {
  RowKernels k{nullptr, &team_rows<Loss, In, false>, &item_rows<Loss, In>};
  if constexpr (kCanReside<Loss, In>) k.resident = &team_rows<Loss, In, true>;
  return k;
}

template <class In, class... Family>
RowKernels find_row_kernels(LossList<Family...>, int loss, const RowArgs& a) {
  RowKernels found{};
  int number = 0;
  const auto try_family = [&](auto family) {
    if (number++ == loss)
      decltype(family)::visit(a, [&](auto member) { found = kernels_of<decltype(member), In>(); });
  };
  (try_family(Family{}), ...);
  return found;
}

}  // namespace mbk::MBK_ISA
