// Element-wise losses: loss, its exact sum and its gradients in one pass. Compiled once per ISA.
#include "core/backend.h"
#include "core/exact_bins.h"
#include "core/row_items.h"
#include "cpu/chunk.h"
#include "cpu/parallel.h"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

// fp64 sums: element i of a block belongs to lane i % kGroup, lanes are joined by halves.
struct OrderedSum {
  f64v lane[kGroup / lanes<f64v>];
  MBK_FN OrderedSum() {
    for (f64v& l : lane) l = f64v{};
  }
  MBK_FN void add(const double* values, int count) {
    for (int k = 0; k < count; k += lanes<f64v>)
      lane[k % kGroup / lanes<f64v>] = lane[k % kGroup / lanes<f64v>] + load<f64v>(values + k);
  }
  MBK_FN double value() {
    for (int half = kGroup / lanes<f64v> / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lane[k] = lane[k] + lane[k + half];
    return sum_lanes(lane[0]);
  }
};

template <class T>
struct Chunk {
  alignas(64) T input[kChunk], target[kChunk], weight[kChunk], item_scale[kChunk];
  alignas(64) T loss[kChunk], grad_input[kChunk], grad_target[kChunk];
};

template <class Loss, class T>
void pointwise(const PointwiseArgs& a) {
  typedef Vector<T> V;
  auto body = [&a](int64_t begin, int64_t end, int thread) {
    Chunk<T> chunk;
    const T factor = (T)(read(a.scale) / read(a.denominator));
    const T parameter = (T)a.parameter;
    const View *const views = a.views, &losses = views[kLosses];
    const View &dinput = views[kGradInput], &dtarget = views[kGradTarget];
    ExactSumState unused;
    ExactBins bins(a.totals ? a.totals[thread] : unused);
    OrderedSum ordered;
    for (int64_t i = begin; i < end; i += kChunk) {
      const Range range{a, i, end - i < kChunk ? (int)(end - i) : kChunk};
      const int count = (range.count + lanes<V> - 1) / lanes<V> * lanes<V>;
      const T* x = read_chunk(views[kInput], range, chunk.input);
      const T* y = read_chunk(views[kTarget], range, chunk.target);
      const T* w = views[kWeight].data ? read_chunk(views[kWeight], range, chunk.weight) : nullptr;
      const T* s =
          views[kItemScale].data ? read_chunk(views[kItemScale], range, chunk.item_scale) : nullptr;
      // Where nothing needs converting, results go straight to their place.
      T* const direct_loss = losses.data ? in_place<T>(losses, range) : nullptr;
      T* const direct_dinput = dinput.data && !a.accumulate ? in_place<T>(dinput, range) : nullptr;
      T* const direct_dtarget =
          dtarget.data && !a.accumulate ? in_place<T>(dtarget, range) : nullptr;
      T* const loss_to = direct_loss ? direct_loss : chunk.loss;
      T* const dinput_to = direct_dinput ? direct_dinput : chunk.grad_input;
      T* const dtarget_to = direct_dtarget ? direct_dtarget : chunk.grad_target;
      const auto eval = [&](int k) __attribute__((always_inline)) {
        V loss, dx, dy, f = splat<V>(factor);
        Loss::eval(load<V>(x + k), load<V>(y + k), parameter, loss, dx, dy);
        if (s) f = f * load<V>(s + k);
        if (w) {
          f = f * load<V>(w + k);
          loss = loss * load<V>(w + k);
        }
        loss = canonical(loss);
        store(loss_to + k, loss);
        if (dinput.data) store(dinput_to + k, canonical(dx * f));
        if (dtarget.data) store(dtarget_to + k, canonical(dy * f));
        return loss;
      };
      const int full = range.count / lanes<V> * lanes<V>;
      int k = 0;
      if constexpr (sizeof(T) == 4) {  // summed at once: hidden behind the memory accesses
        if (a.totals)
          for (; k < full; k += lanes<V>) bins.add(eval(k));
      }
      for (; k < count; k += lanes<V>) eval(k);
      for (k = range.count; k < count; ++k) loss_to[k] = 0;  // padding is no item
      if constexpr (sizeof(T) == 4) {
        if (a.totals && full < count) bins.add(load<V>(loss_to + full));
      } else if (a.partial_sums) {
        if (i % kPointwiseBlock == 0) ordered = OrderedSum();
        ordered.add(loss_to, count);
        if (i + range.count == end || (i + range.count) % kPointwiseBlock == 0)
          a.partial_sums[i / kPointwiseBlock] = ordered.value();
      }
      if (losses.data && !direct_loss) write_chunk<false>(losses, range, loss_to);
      if (a.accumulate) {
        if (dinput.data) write_chunk<true>(dinput, range, dinput_to);
        if (dtarget.data) write_chunk<true>(dtarget, range, dtarget_to);
      } else {
        if (dinput.data && !direct_dinput) write_chunk<false>(dinput, range, dinput_to);
        if (dtarget.data && !direct_dtarget) write_chunk<false>(dtarget, range, dtarget_to);
      }
    }
    if (sizeof(T) == 4 && a.totals) {
      bins.flush();
      normalise(a.totals[thread]);
    }
  };
  parallel_for(a.size, kPointwiseBlock, a.threads, body);
}

template <class... L>
PointwiseFn find(LossList<L...>, int loss, DType type) {
  static constexpr PointwiseFn functions[][2] = {{&pointwise<L, float>, &pointwise<L, double>}...};
  return functions[loss][type == DType::f64];
}

}  // namespace

PointwiseFn pointwise_function(int loss, DType type) { return find(PointwiseLosses{}, loss, type); }

// The exact sum of an fp32 view (the weights, for the divisor of a mean).
void pointwise_sum(const PointwiseArgs& a) {
  auto body = [&a](int64_t begin, int64_t end, int thread) {
    alignas(64) float buffer[kChunk];
    ExactBins bins(a.totals[thread]);
    for (int64_t i = begin; i < end; i += kChunk) {
      const Range range{a, i, end - i < kChunk ? (int)(end - i) : kChunk};
      const float* values = read_chunk(a.views[kLosses], range, buffer);
      for (int k = 0; k < range.count; k += lanes<f32v>) bins.add(load<f32v>(values + k));
    }
    bins.flush();
    normalise(a.totals[thread]);
  };
  parallel_for(a.size, kPointwiseBlock, a.threads, body);
}

}  // namespace mbk::MBK_ISA
