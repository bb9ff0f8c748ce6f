#pragma once
// One step of an element-wise loss: several vectors of elements, from loading their inputs to
// storing their gradients.
#include "core/exact_bins.h"
#include "cpu/chunk.h"
#include "losses/pointwise.h"

namespace mbk::MBK_ISA {
namespace {

// Vectors at a time: the steps of one fill the waits of the others.
template <class V, bool kUsual>
constexpr int kAtOnce = lanes<V> == 1 ? 1
                        : kUsual      ? 4
                                      : 2;

// Inputs and gradients of a chunk as arrays of S. Gradients that are not wanted are null.
template <class S, int kInputs>
struct Operands {
  const S* x[kInputs];
  S* grad[kInputs];
  bool streams[kInputs];

  // Gradient v in its own memory, where nothing needs converting.
  MBK_FN bool take_grad(const PointwiseArgs& a, const Range& range, int v) {
    const View& view = a.views[kGrad + v];
    grad[v] = view.data && !a.accumulate ? in_place<S>(view, range) : nullptr;
    streams[v] = grad[v] && streams_past_caches<Vector<Compute<S>>>(view.data, a.views[v].data,
                                                                    a.size * (int64_t)sizeof(S), 0);
    return grad[v] || !view.data;
  }
  // All of them in their own memory, if none needs converting. `ones` is what is absent.
  MBK_FN bool take(const PointwiseArgs& a, const Range& range, const S* ones) {
    for (int v = 0; v < kInputs; ++v) {
      x[v] = a.views[v].data ? in_place<S>(a.views[v], range) : ones;
      if (!take_grad(a, range, v) || !x[v]) return false;
    }
    return true;
  }
  MBK_FN bool only_first_grad() const {
    bool only = grad[0] != nullptr;
    for (int v = 1; v < kInputs; ++v) only = only && !grad[v];
    return only;
  }
};

// What multiplies the elements of a chunk, or null, and where their losses go.
template <class T>
struct Extras {
  T factor;
  const T *weight, *rescale, *item_scale;
  T* losses;
  bool any;  // factors
  MBK_FN Extras(T f, const T* w, const T* r, const T* s, T* l)
      : factor(f), weight(w), rescale(r), item_scale(s), losses(l), any(w || r || s) {}
};

// The inputs of elements from k on.
template <bool kInPairs, class S, int kInputs, class V, int kVectors>
MBK_FN void load_inputs(const Operands<S, kInputs>& operands, int k, V (&x)[kVectors][kInputs]) {
  for (int v = 0; v < kInputs; ++v) {
    const S* const from = operands.x[v] + k;
    if constexpr (kInPairs) {
      for (int u = 0; u < kVectors; u += 2) load_two(from + u * lanes<V>, x[u][v], x[u + 1][v]);
    } else {
      for (int u = 0; u < kVectors; ++u) x[u][v] = load<V>(from + u * lanes<V>);
    }
  }
}

// Elements from k on. Usual are fp32, the usual flags, no extras, and nothing wanted but the sum of
// the losses and the gradient of the first input: no branch then keeps the vectors' steps apart.
// `early` are the elements' early numbers, where they have been computed.
template <class Loss, bool kUsual, bool kEarly = false, class Call, class S, class T, class V,
          int kVectors>
MBK_FN void step(Call call, const Operands<S, Loss::kInputs>& operands, const Extras<T>& extras,
                 int k, V (&loss)[kVectors], bool keep_loss, const T* early = nullptr) {
  constexpr int kInputs = Loss::kInputs;
  constexpr bool kInPairs = kUsual && kVectors % 2 == 0;
  if constexpr (kUsual && kHasFlags<Call>) call.assume_usual();
  V x[kVectors][kInputs], d[kVectors][kInputs], f[kVectors];
  load_inputs<kInPairs>(operands, k, x);
  for (int u = 0; u < kVectors; ++u) {
    if constexpr (kEarly) {
      Loss::eval(call, x[u], load<V>(early + u * lanes<V>), loss[u], d[u]);
    } else {
      evaluate<Loss>(call, x[u], loss[u], d[u]);
    }
    f[u] = splat<V>(extras.factor);
  }
  if (!kUsual && extras.any) {
    const T *const w = extras.weight, *const r = extras.rescale, *const s = extras.item_scale;
    for (int u = 0; u < kVectors; ++u) {
      const int at = k + u * lanes<V>;
      if (s) f[u] = f[u] * load<V>(s + at);
      if (w) f[u] = f[u] * load<V>(w + at), loss[u] = loss[u] * load<V>(w + at);
      if (r) f[u] = f[u] * load<V>(r + at), loss[u] = loss[u] * load<V>(r + at);
    }
  }
  if (!kUsual && keep_loss)
    for (int u = 0; u < kVectors; ++u) store(extras.losses + k + u * lanes<V>, canonical(loss[u]));
  for (int v = 0; v < (kUsual ? 1 : kInputs); ++v) {
    if (!kUsual && !operands.grad[v]) continue;
    S* const to = operands.grad[v] + k;
    V g[kVectors];
    for (int u = 0; u < kVectors; ++u) g[u] = canonical(d[u][v] * f[u]);
    if constexpr (kInPairs) {
      if (operands.streams[v])
        for (int u = 0; u < kVectors; u += 2) stream_two(to + u * lanes<V>, g[u], g[u + 1]);
      else
        for (int u = 0; u < kVectors; u += 2) store_two(to + u * lanes<V>, g[u], g[u + 1]);
    } else if (operands.streams[v]) {
      for (int u = 0; u < kVectors; ++u) stream(to + u * lanes<V>, g[u]);
    } else {
      for (int u = 0; u < kVectors; ++u) store(to + u * lanes<V>, g[u]);
    }
  }
}

// Elements [0, whole), losses in fp32 summed at once, hidden behind the memory accesses.
template <class Loss, bool kUsual, class Call, class S, class T>
MBK_FN void steps(const Call& call, const Operands<S, Loss::kInputs>& operands,
                  const Extras<T>& extras, int whole, bool keep_losses, ExactBins& bins,
                  bool sums) {
  typedef Vector<T> V;
  V loss[kAtOnce<V, kUsual>];
  for (int k = 0; k < whole; k += kAtOnce<V, kUsual> * lanes<V>) {
    step<Loss, kUsual>(call, operands, extras, k, loss, keep_losses);
    if constexpr (sizeof(T) == 4)
      if (sums) bins.add(loss);
  }
}
// The same of a loss with an early number in the usual case, block by block in three loops: for the
// early numbers, for losses and gradients, for the sum. In one loop the chain of steps of an
// element is longer than a processor can look ahead to others. The next block is fetched meanwhile.
template <class Loss, class Call, class S>
MBK_FN void steps_in_blocks(Call call, const Operands<S, Loss::kInputs>& operands,
                            const Extras<float>& extras, int whole, ExactBins& bins, bool sums) {
  typedef f32v V;
  constexpr int kInputs = Loss::kInputs, kVectors = kAtOnce<V, true>;
  if constexpr (kHasFlags<Call>) call.assume_usual();
  alignas(64) float block[kChunk];  // early numbers, then losses
  for (int begin = 0; begin < whole; begin += kChunk) {
    const int count = whole - begin < kChunk ? whole - begin : kChunk;
    for (int k = 0; k < count; k += kVectors * lanes<V>) {
      V x[kVectors][kInputs], early[kVectors];
      load_inputs<true>(operands, begin + k, x);
      for (const S* const from : operands.x)
        for (int at = 0; at < kVectors * lanes<V>; at += 64 / (int)sizeof(S))
          __builtin_prefetch(from + begin + kChunk + k + at);
      for (int u = 0; u < kVectors; ++u) early[u] = Loss::early(call, x[u]);
      for (int u = 0; u < kVectors; ++u) store(block + k + u * lanes<V>, early[u]);
    }
    for (int k = 0; k < count; k += 2 * lanes<V>) {
      V loss[2];
      step<Loss, true, true>(call, operands, extras, begin + k, loss, false, block + k);
      for (int u = 0; u < 2; ++u) store(block + k + u * lanes<V>, loss[u]);
    }
    if (!sums) continue;
    for (int k = 0; k < count; k += kVectors * lanes<V>) {
      V loss[kVectors];
      for (int u = 0; u < kVectors; ++u) loss[u] = load<V>(block + k + u * lanes<V>);
      bins.add(loss);
    }
  }
}
template <class Loss, class Call, class S, class T>
MBK_FN void steps(const Call& call, const Operands<S, Loss::kInputs>& operands,
                  const Extras<T>& extras, int whole, bool keep_losses, ExactBins& bins,
                  bool sums) {
  if constexpr (sizeof(T) == 4) {
    bool usual = !extras.any && !keep_losses && operands.only_first_grad();
    if constexpr (kHasFlags<Call>) usual = usual && call.usual();
    if constexpr (kHasEarly<Loss> && lanes<Vector<T>> > 1) {
      if (usual) return steps_in_blocks<Loss>(call, operands, extras, whole, bins, sums);
    } else {
      if (usual) return steps<Loss, true>(call, operands, extras, whole, false, bins, sums);
    }
  }
  steps<Loss, false>(call, operands, extras, whole, keep_losses, bins, sums);
}

}  // namespace
}  // namespace mbk::MBK_ISA
