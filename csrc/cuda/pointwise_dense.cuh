#pragma once
// Element-wise losses as nearly all calls have them: dense, aligned tensors of one storage type,
// no weights, the losses wanted in sum only. All loads of a thread's elements are under way before
// the first is needed, and no branch on a type lies between them.
#include "cuda/packed.cuh"
#include "cuda/pointwise_launch.cuh"
#include "losses/all.h"

namespace mbk::MBK_ISA {

// 16 bytes of a storage type.
template <class S>
struct alignas(16) DenseVector {
  static constexpr int kSize = 16 / sizeof(S), kParts = kSize / 4;
  Packed<S> part[kParts];
  MBK_FN float get(int k) const { return part[k / 4].get(k % 4); }
};

// Adds up losses, exactly: as many as a thread takes at once in one fp64 number where they are of
// a usual size (core/exact_bins.h), which is then split into bins.
struct DenseSum : SumInRounds<kDenseElements> {
  MBK_DEVICE void add(const float (&x)[kDenseElements], ExactSumState& state) {
    static_assert(kDenseElements <= kBatch);
    // Twice a number's bits are its magnitude; 1 less, and a zero is no longer the least of them.
    uint32_t least = ~0u;
    float most = 0;
#pragma unroll
    for (const float v : x) {
      const uint32_t magnitude = 2 * bits(v) - 1;
      least = magnitude < least ? magnitude : least;
      most = max_or_nan(most, __builtin_fabsf(v));
    }
    if (least >= 2u * kNarrowLeast - 1 && most < as_float(kNarrowEnd)) {
      double sum = (double)x[0];
#pragma unroll
      for (int k = 1; k < kDenseElements; ++k) sum += (double)x[k];
      bins.add_split(sum);
    } else {
#pragma unroll
      for (const float v : x) bins.add(v, state);
    }
  }
};

template <class Loss, class S>
struct DensePointwise {
  typedef DenseVector<S> Vector;
  static constexpr int kInputs = Loss::kInputs, kSize = Vector::kSize,
                       kVectors = kDenseElements / kSize;
  typedef typename Loss::template Call<float> Call;

  const PointwiseArgs& a;
  const float factor;
  const Call call;

  MBK_DEVICE explicit DensePointwise(const PointwiseArgs& args)
      : a(args), factor((float)(read(a.scale) / read(a.denominator))), call(usual(args)) {}
  static MBK_DEVICE Call usual(const PointwiseArgs& a) {
    Call call(a.parameters);
    if constexpr (kHasFlags<Call>) call.assume_usual();
    return call;
  }

  template <class P>
  MBK_DEVICE P* data(int view) const {
    return (P*)a.views[view].data;
  }

  // The thread's elements of a tile: vectors that are a block of threads apart. Past the end the
  // losses are 0.
  MBK_DEVICE void vectors(int64_t first, int64_t count, float (&loss)[kDenseElements]) const {
    Vector x[kVectors][kInputs];
    Packed<float> old[kVectors][Vector::kParts];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int64_t j = first + u * kPointwiseThreads;
      if (j >= count) continue;
#pragma unroll
      for (int v = 0; v < kInputs; ++v) x[u][v] = data<const Vector>(v)[j];
      if (a.accumulate && a.views[kGrad].data)
#pragma unroll
        for (int h = 0; h < Vector::kParts; ++h)
          old[u][h] = data<const Packed<float>>(kGrad)[j * Vector::kParts + h];
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int64_t j = first + u * kPointwiseThreads;
      float d[kInputs][kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) loss[u * kSize + k] = 0;
      if (j >= count) continue;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        float in[kInputs], one[kInputs];
#pragma unroll
        for (int v = 0; v < kInputs; ++v) in[v] = x[u][v].get(k);
        evaluate<Loss>(call, in, loss[u * kSize + k], one);
#pragma unroll
        for (int v = 0; v < kInputs; ++v) d[v][k] = one[v] * factor;
      }
#pragma unroll
      for (int v = 0; v < kInputs; ++v) {
        if (!a.views[kGrad + v].data) continue;
        if (a.accumulate)
          add_to(v, j, d[v], v == 0 ? old[u] : nullptr);
        else
          write(v, j, d[v]);
      }
    }
  }
  static MBK_DEVICE bool any_nan(const float (&x)[kSize]) {
    bool any = false;
#pragma unroll
    for (const float v : x) any = any || v != v;
    return any;
  }
  MBK_DEVICE void write(int v, int64_t j, float (&g)[kSize]) const {
    Vector packed{};
    if (any_nan(g)) {  // rarely: ours is another NaN than the conversion's
#pragma unroll
      for (int k = 0; k < kSize; ++k) packed.part[k / 4].set(k % 4, narrow<S>(canonical(g[k])));
    } else {
#pragma unroll
      for (int h = 0; h < Vector::kParts; ++h) {
        const float four[4] = {g[4 * h], g[4 * h + 1], g[4 * h + 2], g[4 * h + 3]};
        packed.part[h] = pack<S>(four);
      }
    }
    data<Vector>(kGrad + v)[j] = packed;
  }
  // Into a float32 buffer; `old`: what it holds, or null.
  MBK_DEVICE void add_to(int v, int64_t j, const float (&g)[kSize],
                         const Packed<float>* old) const {
    Packed<float>* const to = data<Packed<float>>(kGrad + v) + j * Vector::kParts;
#pragma unroll
    for (int h = 0; h < Vector::kParts; ++h) {
      Packed<float> sum = old ? old[h] : to[h];
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.set(k, canonical(sum.get(k) + g[4 * h + k]));
      to[h] = sum;
    }
  }

  // One of the elements behind the last whole vector.
  MBK_DEVICE float element(int64_t i) const {
    float in[kInputs], d[kInputs], loss;
#pragma unroll
    for (int v = 0; v < kInputs; ++v) in[v] = widen(data<const S>(v)[i]);
    evaluate<Loss>(call, in, loss, d);
#pragma unroll
    for (int v = 0; v < kInputs; ++v) {
      if (!a.views[kGrad + v].data) continue;
      const float g = d[v] * factor;
      if (a.accumulate) {
        float& to = data<float>(kGrad + v)[i];
        to = canonical(to + g);
      } else {
        data<S>(kGrad + v)[i] = narrow<S>(canonical(g));
      }
    }
    return loss;
  }
};

// As many as there are registers for; from compute capability 10.0 on the compiler needs more.
template <class Loss>
MBK_FN constexpr int dense_blocks(int capability) {
  return Loss::kInputs > 2 || kHasEarly<Loss> || capability >= 100 ? 3 : 4;
}
#if defined(__CUDA_ARCH__)
inline constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
inline constexpr int kCapability = 90;
#endif

template <class Loss, class S>
__global__ void __launch_bounds__(kPointwiseThreads, dense_blocks<Loss>(kCapability))
    pointwise_dense(const __grid_constant__ PointwiseLaunch p) {
  typedef DensePointwise<Loss, S> Loop;
  PointwiseShared& shared = *shared_memory<PointwiseShared>();
  if (threadIdx.x == 0) clear(shared.total);
  __syncthreads();
  const Loop loop(p.args);
  const int64_t count = p.args.size / Loop::kSize;
  constexpr int64_t kTile = Loop::kVectors * kPointwiseThreads;  // vectors
  DenseSum sum;
  for (int64_t tile = blockIdx.x * kTile; tile < count; tile += gridDim.x * kTile) {
    float loss[kDenseElements];
    loop.vectors(tile + threadIdx.x, count, loss);
    if (!p.totals) continue;
    sum.add(loss, shared.total);
    sum.end_round(shared.total);
  }
  const int64_t i = count * Loop::kSize + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && i < p.args.size) {
    const float loss = loop.element(i);
    if (p.totals) sum.bins.add(loss, shared.total);
  }
  if (p.totals) sum.bins.flush_warp(shared.total);
  finish_pointwise(p, shared);
}

template <class Loss>
bool is_usual(const PointwiseArgs& a) {
  for (int v = 0; v < Loss::kInputs; ++v)
    if (!a.views[v].data) return false;
  typedef typename Loss::template Call<float> Call;
  if constexpr (kHasFlags<Call>) return Call(a.parameters).usual();
  return true;
}
template <class S, class... L>
DenseKernel find_dense(LossList<L...>, int loss, const PointwiseArgs& a) {
  static constexpr DenseKernel kernels[] = {{&pointwise_dense<L, S>, &dense_blocks<L>}...};
  static constexpr bool (*usual[])(const PointwiseArgs&) = {&is_usual<L>...};
  return usual[loss](a) ? kernels[loss] : DenseKernel{};
}

}  // namespace mbk::MBK_ISA
