#pragma once
// Losses of the target's column alone: the rest of a row is not read, and its gradient is 0.
#include "core/exact_sum.h"
#include "core/multirow_items.h"
#include "core/row_items.h"
#include "cpu/multirow_row.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class T>
MBK_HOST_FN void target_losses(const MultirowArgs& args, int64_t grain) {
  auto body = [&args](int64_t begin, int64_t end, int thread) {
    const MultirowArgs& a = args;
    const ItemScale<T> item_scale(a);
    const RowTensor& grad = a.grads[0];
    int64_t size = 0;
    with_storage(grad.dtype, [&](auto* type) { size = sizeof *type; });
    const bool dense = grad.strides.column == 1, clears = grad.data && !a.accumulate;
    const bool adjacent = dense && a.inner_size == 1 && grad.strides.outer == a.columns &&
                          grad.data != a.inputs[0].data;
    if (clears && adjacent)
      memset((char*)grad.data + begin * a.columns * size, 0,
             (size_t)((end - begin) * a.columns * size));
    Constants c{};
    for (int64_t i = begin; i < end; ++i) {
      const ItemPosition at(a, i);
      RowOf<T> x, g;
      x.open(a.inputs[0], at, false);
      g.open(grad, at, false);
      const int64_t target = item_target(a, at);
      const T logit = target >= 0 ? x.value(target) : (T)0;
      if (clears && !adjacent) {  // after x is read: they may be one
        if (dense) memset(g.data, 0, (size_t)(a.columns * size));
        for (int64_t j = 0; !dense && j < a.columns; ++j) g.put(j, 0, false, 0);
      }
      T loss = 0;
      if (target >= 0) {
        MultirowItem item;
        item.target_logit = (double)logit;
        item.target_weight = a.class_weight ? (double)((const T*)a.class_weight)[target] : 1;
        item.scale = item_scale(a, at);
        if (g.data) {
          const T old = a.accumulate ? g.value(target) : (T)0;
          g.put(target, (T)Loss::factors(a, item, c), a.accumulate, old);
        }
        const double weight = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
        loss = canonical((T)(Loss::loss(a, item) * weight));
      }
      if (a.losses) ((T*)a.losses)[i] = loss;
      if constexpr (sizeof(T) == 4)
        if (a.totals) add(a.totals[thread], loss);
    }
    if (a.totals) normalise(a.totals[thread]);
  };
  parallel_for(args.items, grain, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
