// Element-wise losses: loss, its exact sum and its gradients in one pass. Compiled once per ISA.
#include "core/backend.h"
#include "core/exact_bins.h"
#include "core/row_items.h"
#include "cpu/parallel.h"
#include "cpu/pointwise_step.h"
#include "cpu/pointwise_sum.h"
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
    constexpr int n = lanes<f64v>;
    int k = 0;
    for (; k + kGroup <= count; k += kGroup)
      for (int l = 0; l < kGroup / n; ++l) lane[l] = lane[l] + load<f64v>(values + k + l * n);
    for (; k < count; k += n) lane[k % kGroup / n] = lane[k % kGroup / n] + load<f64v>(values + k);
  }
  MBK_FN double value() const { return sum_lanes(lane); }
};

template <class T>
struct Chunk {
  alignas(64) T input[kPointwiseInputs][kChunk], grad[kPointwiseInputs][kChunk];
  alignas(64) T weight[kChunk], rescale[kChunk], item_scale[kChunk], loss[kChunk];
  alignas(64) uint16_t ones[kChunk];  // of a 16-bit type: an input that is absent
};

// Where inputs and gradients are plain arrays of one type, and nothing else takes part, nothing is
// copied to a chunk's arrays: it can be long. Only vectors of 16-bit types are converted on the
// way.
inline constexpr int64_t kLongChunk = 4096;
template <class V>
MBK_FN bool copies_nothing(const PointwiseArgs& a, int inputs) {
  const View* const v = a.views;
  const DType storage = v[kInput].dtype;
  bool plain = a.dims == 1 && !a.accumulate;
  plain = plain && (storage == DType::f32 || (lanes<V> > 1 && storage != DType::f64));
  for (int extra = kWeight; extra <= kLosses; ++extra) plain = plain && !v[extra].data;
  for (int k = 0; k < inputs; ++k) {
    const View &x = v[k], &grad = v[kGrad + k];
    plain = plain && x.data && x.dtype == storage && x.strides[0] == 1;
    plain = plain && (!grad.data || (grad.dtype == storage && grad.strides[0] == 1));
  }
  return plain;
}

template <class Loss, class T>
void pointwise(const PointwiseArgs& a) {
  typedef Vector<T> V;
  auto body = [&a](int64_t begin, int64_t end, int thread) {
    // Here: clang 15 captures no constant of the function.
    constexpr int kInputs = Loss::kInputs, kStep = kAtOnce<V, true> * lanes<V>;
    Chunk<T> chunk;
    const T factor = (T)(read(a.scale) / read(a.denominator));
    const typename Loss::template Call<T> call(a.parameters);
    const View *const views = a.views, &losses = views[kLosses];
    for (int v = 0; v < kInputs; ++v)
      if (!views[v].data)
        for (T& one : chunk.input[v]) one = 1;
    const DType storage = views[kInput].dtype;
    if (storage == DType::bf16 || storage == DType::f16)
      for (uint16_t& one : chunk.ones)
        one = storage == DType::bf16 ? narrow<bf16>(1).bits : narrow<f16>(1).bits;
    const auto read_if = [&](int v, const Range& range, T* buffer) {
      return views[v].data ? read_chunk(views[v], range, buffer) : nullptr;
    };
    ExactSumState unused;
    ExactBins bins(a.totals ? a.totals[thread] : unused);
    LossSums sums(a.totals ? &a.totals[thread] : nullptr, unused);
    OrderedSum ordered;
    const bool can_be_long = sizeof(T) == 4 && copies_nothing<V>(a, kInputs);
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t left = end - i, chunks = left / kChunk * kChunk;
      const int64_t longest = can_be_long && !sums.from_array ? kLongChunk : kChunk;
      next = i + (chunks == 0 ? left : chunks < longest ? chunks : longest);
      const Range range{a, i, (int)(next - i)};
      const int count = (range.count + lanes<V> - 1) / lanes<V> * lanes<V>;
      const int whole = range.count / kStep * kStep;
      // Where nothing needs converting, results go straight to their place.
      T* const direct_loss = losses.data ? in_place<T>(losses, range) : nullptr;
      const Extras<T> extras{
          factor, read_if(kWeight, range, chunk.weight), read_if(kRescale, range, chunk.rescale),
          read_if(kItemScale, range, chunk.item_scale), direct_loss ? direct_loss : chunk.loss};
      const bool keep = losses.data || sizeof(T) == 8 || sums.from_array;
      if constexpr (sizeof(T) == 4 && lanes<V> > 1) {
        // Plain arrays of a 16-bit type are converted on the way, without a copy.
        const auto stepped = [&](auto operands, auto* ones) __attribute__((always_inline)) {
          if (whole != range.count || !operands.take(a, range, ones)) return false;
          steps<Loss>(call, operands, extras, whole, keep, bins, sums.at_once());
          sums.end_chunk(extras.losses, whole, count, bins);
          if (losses.data && !direct_loss) write_chunk<false>(losses, range, extras.losses);
          return true;
        };
        if (storage == DType::bf16 && stepped(Operands<bf16, kInputs>{}, (const bf16*)chunk.ones))
          continue;
        if (storage == DType::f16 && stepped(Operands<f16, kInputs>{}, (const f16*)chunk.ones))
          continue;
      }
      Operands<T, kInputs> operands;
      bool direct[kInputs];
      for (int v = 0; v < kInputs; ++v) {
        operands.x[v] = read_if(v, range, chunk.input[v]);
        if (!operands.x[v]) operands.x[v] = chunk.input[v];
        direct[v] = operands.take_grad(a, range, v);
        if (!direct[v]) operands.grad[v] = chunk.grad[v];
      }
      steps<Loss>(call, operands, extras, whole, keep, bins, sums.at_once());
      V rest[1];
      for (int k = whole; k < count; k += lanes<V>)
        step<Loss, false>(call, operands, extras, k, rest, true);
      for (int k = range.count; k < count; ++k) extras.losses[k] = 0;  // padding is no item
      if constexpr (sizeof(T) == 4) {
        sums.end_chunk(extras.losses, whole, count, bins);
      } else if (a.partial_sums) {
        if (i % kPointwiseBlock == 0) ordered = OrderedSum();
        ordered.add(extras.losses, count);
        if (i + range.count == end || (i + range.count) % kPointwiseBlock == 0)
          a.partial_sums[i / kPointwiseBlock] = ordered.value();
      }
      if (losses.data && !direct_loss) write_chunk<false>(losses, range, extras.losses);
      for (int v = 0; v < kInputs; ++v) {
        if (direct[v]) continue;
        a.accumulate ? write_chunk<true>(views[kGrad + v], range, operands.grad[v])
                     : write_chunk<false>(views[kGrad + v], range, operands.grad[v]);
      }
    }
    fence();
    if (sizeof(T) == 4 && a.totals) {
      bins.flush();
      sums.shifted.flush();
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
      for (int k = 0; k < range.count; k += lanes<f32v>) bins.add({load<f32v>(values + k)});
    }
    bins.flush();
    normalise(a.totals[thread]);
  };
  parallel_for(a.size, kPointwiseBlock, a.threads, body);
}

}  // namespace mbk::MBK_ISA
