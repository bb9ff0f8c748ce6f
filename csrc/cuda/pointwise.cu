// Element-wise losses: loss, its exact sum and its gradients in one pass. Also whole calls of them.
#include "cuda/packed.cuh"
#include "cuda/pointwise_launch.cuh"
#include "cuda/reduce_launch.h"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int kVector = 4;  // elements that a thread takes at once

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
  for (int k = 0; k < kVector; ++k) v.element[k] = narrow<S>(converted<S>(x[k]));
  *(Vector*)((S*)data + i) = v;
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
    ((S*)view.data)[offset] = narrow<S>(converted<S>(x));
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
__global__ void __launch_bounds__(kPointwiseThreads, 3)
    pointwise(const __grid_constant__ PointwiseLaunch p) {
  PointwiseShared& shared = *shared_memory<PointwiseShared>();
  if (threadIdx.x == 0) clear(shared.total);
  __syncthreads();
  const Pointwise<Loss, T> loop(p);
  const int64_t first = (int64_t)blockIdx.x * kPointwiseThreads,
                step = (int64_t)gridDim.x * kPointwiseThreads, size = p.args.size,
                dense = sizeof(T) == 4 && p.vectors ? size / kVector : 0;
  SumInRounds<kVector> sum;
  if constexpr (sizeof(T) == 4) {
    for (int64_t begin = first; begin < dense; begin += step) {
      const int64_t i = begin + threadIdx.x;
      T loss[kVector] = {};
      if (i < dense) loop.vector(i * kVector, loss);
      if (!p.totals) continue;
#pragma unroll
      for (int k = 0; k < kVector; ++k) sum.bins.add(loss[k], shared.total);
      sum.end_round(shared.total);
    }
  }
  for (int64_t begin = dense * kVector + first; begin < size; begin += step) {
    const int64_t i = begin + threadIdx.x;
    const T loss = i < size ? loop.element(i) : (T)0;
    if (sizeof(T) == 8 && p.terms && i < size) p.terms[i] = (double)loss;
    if (sizeof(T) == 8 || !p.totals) continue;
    sum.bins.add((float)loss, shared.total);
    sum.end_round(shared.total);
  }
  if (sizeof(T) == 4 && p.totals) sum.bins.flush_warp(shared.total);
  finish_pointwise(p, shared);
}

template <class... L>
PointwiseKernel find(LossList<L...>, int loss, DType type) {
  static constexpr PointwiseKernel kernels[][2] = {
      {&pointwise<L, float>, &pointwise<L, double>}...};
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

// Whether vectors of 16 bytes can be taken of all views, and only those of a usual call are there.
DenseKernel find_usual(int loss, const PointwiseArgs& a) {
  const DType storage = a.views[0].dtype;
  for (int v = 0; v < kViews; ++v) {
    const View& view = a.views[v];
    if (!view.data) continue;
    if (v >= kPointwiseInputs && v < kGrad) return {};  // weights, or the losses themselves
    if (view.dtype != (v >= kGrad && a.accumulate ? DType::f32 : storage)) return {};
    if (a.dims != 1 || view.strides[0] != 1 || reinterpret_cast<uintptr_t>(view.data) % 16)
      return {};
  }
  switch (storage) {
    case DType::f32:
      return dense_kernel_f32(loss, a);
    case DType::bf16:
      return dense_kernel_bf16(loss, a);
    case DType::f16:
      return dense_kernel_f16(loss, a);
    default:
      return {};
  }
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
  const Device& device = current_device();
  const DenseKernel usual = sizeof(T) == 4 ? find_usual(loss, a) : DenseKernel{};
  const PointwiseKernel kernel = usual.run ? usual.run : find(PointwiseLosses{}, loss, type);
  const int64_t each = kPointwiseThreads * (usual.run ? kDenseElements : kVector),
                wanted = std::max<int64_t>(1, (a.size + each - 1) / each),
                most = (usual.run ? usual.blocks(device.capability) : 8) * device.multiprocessors;
  check(launch(kernel, p, static_cast<unsigned>(std::min(wanted, most)), kPointwiseThreads, 1,
               kPointwiseSharedBytes, work.stream),
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
