// Element-wise losses: loss, its exact sum and its gradients in one pass. Also whole calls of them.
#include "core/merged_shape.h"
#include "cuda/packed.cuh"
#include "cuda/reduce_launch.h"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int kPointwiseThreads = 256;
constexpr int kVector = 4;  // elements that a thread takes at once

struct PointwiseLaunch {
  PointwiseArgs args;
  Result result;
  Workspace* work;
  double* terms;         // of fp64 losses, one an element, to be summed in order; may be null
  bool totals, vectors;  // vectors: every view is dense, and aligned for kVector elements at once
};

// kVector elements of a view, as the type computed in.
template <class T, class S>
MBK_DEVICE void read_dense(const void* data, int64_t i, T (&x)[kVector]) {
  struct alignas(sizeof(S) * kVector <= 16 ? sizeof(S) * kVector : 16) Vector {
    S element[kVector];
  };
  const Vector v = *(const Vector*)((const S*)data + i);
#pragma unroll
  for (int k = 0; k < kVector; ++k) x[k] = (T)widen(v.element[k]);
}
template <class T, class S>
MBK_DEVICE void write_dense(void* data, int64_t i, const T (&x)[kVector]) {
  struct alignas(sizeof(S) * kVector <= 16 ? sizeof(S) * kVector : 16) Vector {
    S element[kVector];
  };
  Vector v;
#pragma unroll
  for (int k = 0; k < kVector; ++k) v.element[k] = narrow<S>((Compute<S>)x[k]);
  *(Vector*)((S*)data + i) = v;
}

// Calls f with a null pointer of a view's storage type; fp64 is out of the question for what a call
// reads that computes in fp32.
template <bool kDouble, class F>
MBK_DEVICE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    default:
      if constexpr (kDouble) {
        if (dtype == DType::f64) return f((double*)nullptr);
      }
      return f((f16*)nullptr);
  }
}
template <class P>
struct Pointee;
template <class S>
struct Pointee<S*> {
  typedef S type;
};

template <class T>
MBK_DEVICE void read_vector(const View& view, int64_t i, T (&x)[kVector]) {
  with_type<sizeof(T) == 8>(view.dtype, [&](auto* type) {
    read_dense<T, typename Pointee<decltype(type)>::type>(view.data, i, x);
  });
}
template <class T>
MBK_DEVICE T read_element(const View& view, int64_t offset) {
  T x;
  with_type<sizeof(T) == 8>(view.dtype, [&](auto* type) {
    x = (T)widen(((const typename Pointee<decltype(type)>::type*)view.data)[offset]);
  });
  return x;
}
// Values have canonical NaNs.
template <class T>
MBK_DEVICE void write_vector(const View& view, int64_t i, const T (&x)[kVector]) {
  with_type<true>(view.dtype, [&](auto* type) {
    write_dense<T, typename Pointee<decltype(type)>::type>(view.data, i, x);
  });
}
template <class T>
MBK_DEVICE void write_element(const View& view, int64_t offset, T x) {
  with_type<true>(view.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    ((S*)view.data)[offset] = narrow<S>((Compute<S>)x);
  });
}

// old + x as the type that the view is computed in, as on the CPU.
template <class T>
MBK_DEVICE T accumulated(const View& view, T old, T x) {
  if (view.dtype == DType::f64) return canonical(old + x);
  return (T)canonical((float)old + (float)x);
}

template <class Loss, class T>
struct Pointwise {
  static constexpr int kInputs = Loss::kInputs;
  const PointwiseLaunch& p;
  const PointwiseArgs& a;
  const T factor;
  const typename Loss::template Call<T> call;

  MBK_DEVICE explicit Pointwise(const PointwiseLaunch& launch)
      : p(launch),
        a(launch.args),
        factor((T)(read(a.scale) / read(a.denominator))),
        call(a.parameters) {}

  MBK_DEVICE bool has(int view) const { return a.views[view].data; }

  // x: the inputs, then weight, rescaling weight and item scale. Returns the loss.
  MBK_DEVICE T eval(const T (&x)[kLosses], T (&grad)[kInputs]) const {
    T in[kInputs], loss, f = factor;
#pragma unroll
    for (int v = 0; v < kInputs; ++v) in[v] = x[v];
    evaluate<Loss>(call, in, loss, grad);
    if (has(kItemScale)) f = f * x[kItemScale];
#pragma unroll
    for (int v = kWeight; v <= kRescale; ++v)
      if (has(v)) {
        f = f * x[v];
        loss = loss * x[v];
      }
#pragma unroll
    for (int v = 0; v < kInputs; ++v) grad[v] = canonical(grad[v] * f);
    return canonical(loss);
  }

  // Elements [i, i + kVector) of dense views.
  MBK_DEVICE void vector(int64_t i, T (&loss)[kVector]) const {
    const View* const views = a.views;
    T x[kLosses][kVector], grad[kInputs][kVector];
#pragma unroll
    for (int v = 0; v < kLosses; ++v) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) x[v][k] = 1;
      if ((v < kInputs || v >= kPointwiseInputs) && has(v)) read_vector(views[v], i, x[v]);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      T one[kLosses], d[kInputs];
#pragma unroll
      for (int v = 0; v < kLosses; ++v) one[v] = x[v][k];
      loss[k] = eval(one, d);
#pragma unroll
      for (int v = 0; v < kInputs; ++v) grad[v][k] = d[v];
    }
    if (has(kLosses)) write_vector(views[kLosses], i, loss);
#pragma unroll
    for (int v = 0; v < kInputs; ++v)
      if (has(kGrad + v)) write_gradient(views[kGrad + v], i, grad[v]);
  }
  MBK_DEVICE void write_gradient(const View& view, int64_t i, T (&g)[kVector]) const {
    if (a.accumulate) {
      T old[kVector];
      read_vector(view, i, old);
#pragma unroll
      for (int k = 0; k < kVector; ++k) g[k] = accumulated(view, old[k], g[k]);
    }
    write_vector(view, i, g);
  }

  // Element i of views of any layout.
  MBK_DEVICE T element(int64_t i) const {
    const View* const views = a.views;
    int64_t at[kViews] = {};
    for (int d = a.dims - 1; d >= 0; --d) {
      const int64_t outer = d ? i / a.shape[d] : 0, index = i - outer * a.shape[d];
#pragma unroll
      for (int v = 0; v < kViews; ++v) at[v] += index * views[v].strides[d];
      i = outer;
    }
    T x[kLosses], grad[kInputs];
#pragma unroll
    for (int v = 0; v < kLosses; ++v) {
      const bool used = v < kInputs || v >= kPointwiseInputs;
      x[v] = used && has(v) ? read_element<T>(views[v], at[v]) : (T)1;
    }
    const T loss = eval(x, grad);
    if (has(kLosses)) write_element(views[kLosses], at[kLosses], loss);
#pragma unroll
    for (int v = 0; v < kInputs; ++v)
      if (has(kGrad + v)) write_gradient(views[kGrad + v], at[kGrad + v], grad[v]);
    return loss;
  }
  MBK_DEVICE void write_gradient(const View& view, int64_t offset, T g) const {
    if (a.accumulate) g = accumulated(view, read_element<T>(view, offset), g);
    write_element(view, offset, g);
  }
};

template <class Loss, class T>
__global__ void __launch_bounds__(kPointwiseThreads, Loss::kInputs == 2 ? 4 : 3)
    pointwise(const __grid_constant__ PointwiseLaunch p) {
  struct Shared {
    ExactSumState total;
    int is_last;
  };
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) clear(shared.total);
  __syncthreads();
  const Pointwise<Loss, T> loop(p);
  const int64_t first = (int64_t)blockIdx.x * kPointwiseThreads + threadIdx.x,
                threads = (int64_t)gridDim.x * kPointwiseThreads, size = p.args.size;
  const int64_t dense = sizeof(T) == 4 && p.vectors ? size / kVector : 0;
  CompactThreadSum sum;
  if constexpr (sizeof(T) == 4) {
    for (int64_t i = first; i < dense; i += threads) {
      T loss[kVector];
      loop.vector(i * kVector, loss);
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (p.totals) sum.add(loss[k], shared.total);
    }
  }
  for (int64_t i = dense * kVector + first; i < size; i += threads) {
    const T loss = loop.element(i);
    if (sizeof(T) == 4 && p.totals) sum.add((float)loss, shared.total);
    if (sizeof(T) == 8 && p.terms) p.terms[i] = (double)loss;
  }
  if (sizeof(T) == 4 && p.totals) {
    sum.flush_warp(shared.total);
    __syncthreads();
    if (threadIdx.x == 0) {
      normalise(shared.total);
      if (gridDim.x > 1) merge_atomically(p.work->total, shared.total);
    }
  }
  if (!is_last_block(&p.work->losses_done, &shared.is_last) || threadIdx.x != 0) return;
  const double divisor = read(p.args.denominator);
  if (p.totals) {
    if (gridDim.x > 1) read_state(shared.total, p.work->total);
    finish(p.result, shared.total, divisor);
  }
  p.work->divisor = divisor;
}

using Kernel = void (*)(PointwiseLaunch);
template <class... L>
Kernel find(LossList<L...>, int loss, DType type) {
  static constexpr Kernel kernels[][2] = {{&pointwise<L, float>, &pointwise<L, double>}...};
  return kernels[loss][type == DType::f64];
}

template <class T>
struct DistinctWeights {
  PointwiseArgs args;
  MBK_DEVICE T operator()(int64_t i) const {
    const View& w = args.views[kLosses];
    return ((const T*)w.data)[view_offset(args, w, i)];
  }
};

bool is_dense(const PointwiseArgs& a) {
  constexpr size_t size[kDTypes] = {4, 2, 2, 8};
  for (const View& v : a.views) {
    if (!v.data) continue;
    const size_t bytes = std::min<size_t>(16, size[static_cast<int>(v.dtype)] * kVector);
    if (a.dims != 1 || v.strides[0] != 1 || reinterpret_cast<uintptr_t>(v.data) % bytes)
      return false;
  }
  return true;
}

template <class T>
void run(const Queue& queue, int loss, DType type, PointwiseArgs a, const Result& result) {
  a.size = 1;
  for (int d = 0; d < a.dims; ++d) a.size *= a.shape[d];
  const Work work(queue, a.size);
  work.clear();
  merge_dims(a);

  const bool mean = result.reduction == Reduction::mean;
  a.denominator = mean && result.has_denominator
                      ? result.denominator
                      : Scalar{mean ? static_cast<double>(a.size) : 1.0, nullptr, DType::f64};
  if (mean && !result.has_denominator && a.views[kWeight].data && a.size > 0) {
    DistinctWeights<T> weights{a};
    const double times = keep_distinct_weights(weights.args);
    launch_reduce<T>(work, weights, weights.args.size,
                     {&work.state->divisor, times, nullptr, {}, {}});
    a.denominator = {0, &work.state->divisor, DType::f64};
  }
  const bool reduces = (result.reduction != Reduction::none && result.loss) || result.loss_sum;
  PointwiseLaunch p{a, result, work.state, nullptr, reduces && sizeof(T) == 4, is_dense(a)};
  if (reduces && sizeof(T) == 8) p.terms = work.losses;
  const int64_t each = kPointwiseThreads * kVector;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(1, (a.size + each - 1) / each),
                                              int64_t{8} * current_device().multiprocessors));
  check(launch(find(PointwiseLosses{}, loss, type), p, blocks, kPointwiseThreads, 1,
               sizeof(ExactSumState) + 16, work.stream),
        "launching an element-wise loss");
  if (reduces && sizeof(T) == 8)
    launch_reduce<T>(work, Array<T>{reinterpret_cast<const T*>(work.losses)}, a.size,
                     {nullptr, 1, nullptr, result, a.denominator});
}

}  // namespace

void run_pointwise_loss(const Queue& queue, int loss, DType type, PointwiseArgs args,
                        const Result& result) {
  type == DType::f64 ? run<double>(queue, loss, type, args, result)
                     : run<float>(queue, loss, type, args, result);
}

}  // namespace mbk::MBK_ISA
