#pragma once
// From the total of a call to its loss, with one rounding.
#include "core/dtype.h"
#include "core/exact_sum.h"
#include "core/result.h"

namespace mbk::MBK_ISA {

MBK_FN void store_rounded(void* to, DType dtype, double value) {
  value = canonical(value);
  switch (dtype) {
    case DType::f32:
      *(float*)to = canonical((float)value);  // a GPU makes another NaN of an fp64 one
      break;
    case DType::bf16:
      *(bf16*)to = narrow<bf16>(canonical(round_to_odd(value)));
      break;
    case DType::f16:
      *(f16*)to = narrow<f16>(canonical(round_to_odd(value)));
      break;
    default:
      *(double*)to = value;
  }
}

// loss = total / divisor (mean) or total (sum). An exact total is used up.
MBK_FN void store_result(const Result& r, ExactSumState& total, double divisor) {
  if (!r.loss || r.reduction == Reduction::none) return;
  const bool mean = r.reduction == Reduction::mean;
  // Rounded to odd in fp64, so that the rounding to a narrower type is the only one.
  const double sum = round_in_place(total, !mean && r.loss_dtype != DType::f64);
  store_rounded(r.loss, r.loss_dtype, mean ? sum / divisor : sum);
}
MBK_FN void store_result(const Result& r, double total, double divisor) {
  if (!r.loss || r.reduction == Reduction::none) return;
  store_rounded(r.loss, r.loss_dtype, r.reduction == Reduction::mean ? total / divisor : total);
}

}  // namespace mbk::MBK_ISA
