#pragma once
// Losses of the target's column alone: the rest of a row is not read, and its gradient is 0.
#include "core/exact_bins.h"
#include "core/multirow_items.h"
#include "core/row_items.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

// From where on a gradient is cleared past the caches. That takes 0.4 of the time where its memory
// is in no cache, as after a step of a model, and 1.25 where it is.
inline constexpr int64_t kMostClearedInCache = 1 << 23;

// Clears memory by whole vectors: memset's string instructions are half as fast on some processors
// where a piece is of hundreds of kilobytes.
MBK_PASS void clear(char* to, int64_t bytes, bool streams) {
  constexpr int64_t kSize = sizeof(f32v), kAtOnce = 4;
  int64_t end = 0;
  if constexpr (lanes<f32v> > 1) {
    const int64_t aligned = (kSize - (int64_t)((uintptr_t)to % kSize)) % kSize;
    const int64_t head = aligned < bytes ? aligned : bytes;
    end = head + (bytes - head) / (kAtOnce * kSize) * (kAtOnce * kSize);
    memset(to, 0, (size_t)head);
    for (int64_t at = head; at < end; at += kAtOnce * kSize)
      for (int64_t k = 0; k < kAtOnce; ++k) {
        float* const vector = (float*)(to + at + k * kSize);
        streams ? stream(vector, f32v{}) : store(vector, f32v{});
      }
  }
  memset(to + end, 0, (size_t)(bytes - end));
}

// A few items at a time: layouts and types are asked once for all of them.
template <class Loss, class T>
struct TargetItems {
  static constexpr int kMost = 256;

  const MultirowArgs& a;
  const ItemScale<T> item_scale;
  const RowTensor &x, &grad;
  int64_t first = 0;
  int count = 0;
  int64_t target[kMost];
  alignas(64) T logit[kMost], gradient[kMost], loss[kMost];

  MBK_FN explicit TargetItems(const MultirowArgs& args)
      : a(args), item_scale(args), x(args.inputs[0]), grad(args.grads[0]) {}

  // Calls f(k, position) for each item, by its number among them.
  template <class F>
  MBK_FN void each(F f) const {
    ItemPosition at(a, first);
    if (a.inner_size == 1)
      for (int k = 0; k < count; ++k, ++at.outer) f(k, at);
    else
      for (int k = 0; k < count; ++k, at.advance(a)) f(k, at);
  }

  MBK_PASS void read() {
    with_index(a.target, a.target_type, [&](auto* targets) {
      each([&](int k, const ItemPosition& at) {
        target[k] = target_class(a, targets[at.offset(a.target_strides)]);
      });
    });
    with_storage(x.dtype, [&](auto* type) {
      const auto* const data = (const StorageOf<decltype(type)>*)x.data;
      each([&](int k, const ItemPosition& at) {
        logit[k] = 0;
        if (target[k] >= 0)
          logit[k] = (T)widen(data[at.offset(x.strides) + target[k] * x.strides.column]);
      });
    });
  }

  MBK_PASS void compute() {
    const T* const class_weight = (const T*)a.class_weight;
    Constants unused;
    each([&](int k, const ItemPosition& at) {
      loss[k] = gradient[k] = 0;
      if (target[k] < 0) return;
      MultirowItem item;
      item.target_logit = (double)logit[k];
      item.target_weight = class_weight ? (double)class_weight[target[k]] : 1;
      item.scale = item_scale(a, at);
      gradient[k] = (T)Loss::factors(a, item, unused);
      const double weight = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
      loss[k] = canonical((T)(Loss::loss(a, item) * weight));
    });
  }

  // After the inputs are read, which may lie in the same memory.
  MBK_PASS void clear_rows() const {
    with_storage(grad.dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      S* const data = (S*)grad.data;
      const Strides& s = grad.strides;
      const int64_t size = sizeof(S), inner_size = a.inner_size, columns = a.columns;
      if (s.column == 1 && s.outer == columns * inner_size &&
          (inner_size == 1 || s.inner == columns)) {  // row after row
        const bool streams = data != x.data && a.items * columns * size >= kMostClearedInCache;
        clear((char*)(data + first * columns), count * columns * size, streams);
      } else if (s.column == 1) {
        each([&](int, const ItemPosition& at) {
          memset(data + at.offset(s), 0, (size_t)(columns * size));
        });
      } else {  // runs of items, column by column
        ItemPosition at(a, first);
        for (int k = 0; k < count;) {
          const int64_t left = inner_size - at.inner;
          const int run = left < count - k ? (int)left : count - k;
          for (int64_t j = 0; j < columns; ++j) {
            S* const to = data + at.offset(s) + j * s.column;
            for (int64_t i = 0; i < run; ++i) to[i * s.inner] = narrow<S>(0);
          }
          k += run;
          at = ItemPosition(a, first + k);
        }
      }
    });
  }

  MBK_PASS void write() const {
    with_storage(grad.dtype, [&](auto* type) {
      typedef StorageOf<decltype(type)> S;
      each([&](int k, const ItemPosition& at) {
        if (target[k] < 0) return;
        S& to = ((S*)grad.data)[at.offset(grad.strides) + target[k] * grad.strides.column];
        Compute<S> v = (Compute<S>)gradient[k];
        if (a.accumulate) v = widen(to) + v;
        to = narrow<S>(canonical(v));
      });
    });
  }
};

template <class Loss, class T>
MBK_HOST_FN void target_losses(const MultirowArgs& args, int64_t grain) {
  auto body = [&args](int64_t begin, int64_t end, int thread) {
    TargetItems<Loss, T> items(args);
    ExactSumState unused;
    ExactBins bins(args.totals ? args.totals[thread] : unused);
    for (int64_t i = begin; i < end; i += items.count) {
      constexpr int kMost = TargetItems<Loss, T>::kMost;
      items.first = i, items.count = end - i < kMost ? (int)(end - i) : kMost;
      items.read();
      items.compute();
      if (args.grads[0].data) {
        if (!args.accumulate) items.clear_rows();
        items.write();
      }
      if (args.losses) memcpy((T*)args.losses + i, items.loss, (size_t)items.count * sizeof(T));
      if constexpr (sizeof(T) == 4) {
        if (!args.totals) continue;
        for (int k = items.count; k < kMost && k % lanes<f32v>; ++k) items.loss[k] = 0;
        for (int k = 0; k < items.count; k += lanes<f32v>) bins.add({load<f32v>(items.loss + k)});
      }
    }
    fence();
    if (sizeof(T) == 4 && args.totals) {
      bins.flush();
      normalise(args.totals[thread]);
    }
  };
  parallel_for(args.items, grain, args.threads, body);
}

}  // namespace
}  // namespace mbk::MBK_ISA
