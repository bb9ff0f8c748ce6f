// Losses of several rows an item: which of the loops an item takes. Compiled once per ISA.
#include "core/backend.h"
#include "core/multirow_items.h"
#include "cpu/multirow_long.h"
#include "cpu/multirow_short.h"
#include "cpu/multirow_target.h"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class T>
void multirow(const MultirowArgs& args) {
  constexpr int64_t kMostItems = 512;  // the end of a row costs more than a few columns
  const int64_t rows = kElementsPerTask / (args.columns * Loss::kInputs + 1) + 1;
  const int64_t grain = rows < kMostItems ? rows : kMostItems;
  if constexpr (Loss::kLevels == 0) {
    target_losses<Loss, T>(args, grain);
  } else if constexpr (ShortItems<Loss, T>::kSuited) {
    if (items_are_short<T>(args, Loss::kInputs, Loss::kGradients))
      short_items<Loss, T>(args, grain);
    else
      long_items<Loss, T>(args, grain);
  } else {
    long_items<Loss, T>(args, grain);
  }
}

template <class... L>
MultirowFn find(LossList<L...>, int loss, DType type) {
  static constexpr MultirowFn functions[][2] = {{&multirow<L, float>, &multirow<L, double>}...};
  return functions[loss][type == DType::f64];
}

}  // namespace

MultirowFn multirow_function(int loss, DType type) { return find(MultirowLosses{}, loss, type); }

}  // namespace mbk::MBK_ISA
