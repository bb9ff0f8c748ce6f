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
  MBK_FN double value() const { return sum_lanes(lane); }
};

// Vectors at a time: the steps of one fill the waits of the other.
template <class V>
constexpr int kAtOnce = lanes<V> > 1 ? 2 : 1;

template <class T>
struct Chunk {
  alignas(64) T input[kPointwiseInputs][kChunk], grad[kPointwiseInputs][kChunk];
  alignas(64) T weight[kChunk], rescale[kChunk], item_scale[kChunk], loss[kChunk];
};

template <class Loss, class T>
void pointwise(const PointwiseArgs& a) {
  typedef Vector<T> V;
  auto body = [&a](int64_t begin, int64_t end, int thread) {
    constexpr int kInputs = Loss::kInputs;  // here: clang 15 captures no constant of the function
    Chunk<T> chunk;
    const T factor = (T)(read(a.scale) / read(a.denominator));
    const typename Loss::template Call<T> call(a.parameters);
    const View *const views = a.views, &losses = views[kLosses];
    bool streams[kInputs];
    for (int v = 0; v < kInputs; ++v)
      streams[v] = streams_past_caches<V>(views[kGrad + v].data, views[v].data,
                                          a.size * (int64_t)sizeof(T), 0);
    for (int v = 0; v < kInputs; ++v)
      if (!views[v].data)
        for (T& one : chunk.input[v]) one = 1;
    const auto read_if = [&](int v, const Range& range, T* buffer) {
      return views[v].data ? read_chunk(views[v], range, buffer) : nullptr;
    };
    ExactSumState unused;
    ExactBins bins(a.totals ? a.totals[thread] : unused);
    OrderedSum ordered;
    for (int64_t i = begin; i < end; i += kChunk) {
      const Range range{a, i, end - i < kChunk ? (int)(end - i) : kChunk};
      const int count = (range.count + lanes<V> - 1) / lanes<V> * lanes<V>;
      const T* x[kInputs];
      for (int v = 0; v < kInputs; ++v) {
        x[v] = read_if(v, range, chunk.input[v]);
        if (!x[v]) x[v] = chunk.input[v];
      }
      const T* const w = read_if(kWeight, range, chunk.weight);
      const T* const r = read_if(kRescale, range, chunk.rescale);
      const T* const s = read_if(kItemScale, range, chunk.item_scale);
      const bool factors = s || w || r;
      // Where nothing needs converting, results go straight to their place.
      T* const direct_loss = losses.data ? in_place<T>(losses, range) : nullptr;
      T* const loss_to = direct_loss ? direct_loss : chunk.loss;
      T *direct[kInputs], *grad_to[kInputs];
      bool to_memory[kInputs];
      for (int v = 0; v < kInputs; ++v) {
        const View& grad = views[kGrad + v];
        direct[v] = grad.data && !a.accumulate ? in_place<T>(grad, range) : nullptr;
        grad_to[v] = direct[v] ? direct[v] : grad.data ? chunk.grad[v] : nullptr;
        to_memory[v] = direct[v] && streams[v];
      }
      const auto eval = [&](int k, auto& loss, bool keep) __attribute__((always_inline)) {
        constexpr int kVectors = sizeof loss / sizeof loss[0];
        V in[kVectors][kInputs], d[kVectors][kInputs], f[kVectors];
        for (int u = 0; u < kVectors; ++u)
          for (int v = 0; v < kInputs; ++v) in[u][v] = load<V>(x[v] + k + u * lanes<V>);
        for (int u = 0; u < kVectors; ++u) {
          Loss::eval(call, in[u], loss[u], d[u]);
          f[u] = splat<V>(factor);
        }
        if (factors) {
          for (int u = 0; u < kVectors; ++u) {
            const int at = k + u * lanes<V>;
            if (s) f[u] = f[u] * load<V>(s + at);
            if (w) f[u] = f[u] * load<V>(w + at), loss[u] = loss[u] * load<V>(w + at);
            if (r) f[u] = f[u] * load<V>(r + at), loss[u] = loss[u] * load<V>(r + at);
          }
        }
        if (keep)
          for (int u = 0; u < kVectors; ++u) store(loss_to + k + u * lanes<V>, canonical(loss[u]));
        for (int v = 0; v < kInputs; ++v)
          if (grad_to[v])
            for (int u = 0; u < kVectors; ++u) {
              T* const to = grad_to[v] + k + u * lanes<V>;
              const V g = canonical(d[u][v] * f[u]);
              to_memory[v] ? stream(to, g) : store(to, g);
            }
      };
      const int full = range.count / lanes<V> * lanes<V>;
      const bool keep = losses.data || sizeof(T) == 8;
      V several[kAtOnce<V>], one[1];
      constexpr int kStep = kAtOnce<V> * lanes<V>;
      int k = 0;
      for (; k + kStep <= full; k += kStep) {
        eval(k, several, keep);
        if constexpr (sizeof(T) == 4)  // summed at once: hidden behind the memory accesses
          if (a.totals) bins.add(several);
      }
      for (; k < count; k += lanes<V>) eval(k, one, true);
      for (k = range.count; k < count; ++k) loss_to[k] = 0;  // padding is no item
      if constexpr (sizeof(T) == 4) {
        if (a.totals)
          for (k = full / kStep * kStep; k < count; k += lanes<V>) bins.add({load<V>(loss_to + k)});
      } else if (a.partial_sums) {
        if (i % kPointwiseBlock == 0) ordered = OrderedSum();
        ordered.add(loss_to, count);
        if (i + range.count == end || (i + range.count) % kPointwiseBlock == 0)
          a.partial_sums[i / kPointwiseBlock] = ordered.value();
      }
      if (losses.data && !direct_loss) write_chunk<false>(losses, range, loss_to);
      for (int v = 0; v < kInputs; ++v) {
        if (!grad_to[v] || direct[v]) continue;
        a.accumulate ? write_chunk<true>(views[kGrad + v], range, grad_to[v])
                     : write_chunk<false>(views[kGrad + v], range, grad_to[v]);
      }
    }
    fence();
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
      for (int k = 0; k < range.count; k += lanes<f32v>) bins.add({load<f32v>(values + k)});
    }
    bins.flush();
    normalise(a.totals[thread]);
  };
  parallel_for(a.size, kPointwiseBlock, a.threads, body);
}

}  // namespace mbk::MBK_ISA
