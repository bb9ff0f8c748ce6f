// Small operations on dense arrays, exact sums that stay on the device, elementary functions.
#include <string.h>

#include "core/elementary.h"
#include "cuda/reduce_launch.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int kArrayThreads = 256;

unsigned blocks_for(int64_t n) {
  const int64_t wanted = std::max<int64_t>(1, (n + kArrayThreads * 4 - 1) / (kArrayThreads * 4));
  return static_cast<unsigned>(
      std::min<int64_t>(wanted, int64_t{8} * current_device().multiprocessors));
}
template <class F>
MBK_DEVICE void each(int64_t n, F f) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
       i += (int64_t)gridDim.x * blockDim.x)
    f(i);
}
template <class P>
void launch_arrays(const Queue& queue, void (*kernel)(P), const P& p, int64_t n) {
  check(launch(kernel, p, blocks_for(n), kArrayThreads, 1, 0, stream_of(queue)),
        "launching an operation on arrays");
}

// Calls f with a null pointer of the storage type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
  }
}

template <class S>
struct Scale {
  S* x;
  int64_t n;
  Scalar factor, hint;
  bool keep_zeros;
};
template <class S>
__global__ void __launch_bounds__(kArrayThreads) scale(const __grid_constant__ Scale<S> p) {
  const double value = read(p.factor) / read(p.hint);
  if (value == 1) return;
  const bool keep_zeros = p.keep_zeros && !(abs(value) < (double)__builtin_inff());
  const Compute<S> f = (Compute<S>)value;
  each(p.n, [&](int64_t i) {
    const Compute<S> x = widen(p.x[i]);
    if (!(keep_zeros && x == 0)) p.x[i] = narrow<S>(canonical(x * f));
  });
}

template <class From, class To>
struct Convert {
  const From* from;
  To* to;
  int64_t n;
};
template <class From, class To>
__global__ void __launch_bounds__(kArrayThreads)
    convert(const __grid_constant__ Convert<From, To> p) {
  each(p.n, [&](int64_t i) { p.to[i] = narrow<To>(canonical(computed_as<To>(widen(p.from[i])))); });
}

// One thread's work; states are global memory, or copies in shared memory.
struct Exact {
  ExactSumState* into;
  const ExactSumState* from;
  Result result;
};
__global__ void exact_end(const __grid_constant__ Exact p) {
  ExactSumState* const copy = shared_memory<ExactSumState>();
  *copy = *p.from;
  if (p.into) {
    normalise(*copy);
    normalise(*p.into);
    merge(*p.into, *copy);
  } else {
    const double divisor = p.result.has_denominator ? read(p.result.denominator) : 1;
    store_result(p.result, *copy, divisor);
  }
}
void launch_exact(const Queue& queue, const Exact& p) {
  check(launch(&exact_end, p, 1, 1, 1, sizeof(ExactSumState), stream_of(queue)),
        "launching an exact sum");
}

template <class T>
struct Over {
  const T* x;
  T* y;
  int64_t n;
};
template <class F, class T>
__global__ void __launch_bounds__(kArrayThreads) over_array(const __grid_constant__ Over<T> p) {
  each(p.n, [&](int64_t i) { p.y[i] = F::of(p.x[i]); });
}
template <class F>
bool try_function(const char* name, const Queue& queue, bool in_double, const void* x, void* y,
                  int64_t n) {
  if (strcmp(name, F::name) != 0) return false;
  if (in_double)
    launch_arrays(queue, &over_array<F, double>,
                  Over<double>{static_cast<const double*>(x), static_cast<double*>(y), n}, n);
  else
    launch_arrays(queue, &over_array<F, float>,
                  Over<float>{static_cast<const float*>(x), static_cast<float*>(y), n}, n);
  return true;
}
template <class... F>
bool find_function(FunctionList<F...>, const char* name, const Queue& queue, bool in_double,
                   const void* x, void* y, int64_t n) {
  return (try_function<F>(name, queue, in_double, x, y, n) || ...);
}

}  // namespace

// All kernels are compiled for the same architectures; this one is small.
int code_capability() {
  int capability = 0;
  check(compiled_for(&capability, &exact_end), "asking what the kernels were compiled for");
  return capability;
}

int64_t workspace_bytes(int64_t items, bool in_double) {
  if (!in_double) return kWorkspaceBytes;
  const int64_t numbers = items + block_sums(items) + kSpareBlockSums;
  return kWorkspaceBytes + numbers * static_cast<int64_t>(sizeof(double));
}

void scale_array(const Queue& queue, void* x, DType dtype, int64_t n, const Scalar& factor,
                 const Scalar& hint, bool keep_zeros) {
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    launch_arrays(queue, &scale<S>, Scale<S>{static_cast<S*>(x), n, factor, hint, keep_zeros}, n);
  });
}

void convert_array(const Queue& queue, const void* from, DType from_dtype, void* to, DType to_dtype,
                   int64_t n) {
  with_type(from_dtype, [&](auto* from_type) {
    with_type(to_dtype, [&](auto* to_type) {
      using From = std::remove_pointer_t<decltype(from_type)>;
      using To = std::remove_pointer_t<decltype(to_type)>;
      launch_arrays(queue, &convert<From, To>,
                    Convert<From, To>{static_cast<const From*>(from), static_cast<To*>(to), n}, n);
    });
  });
}

void exact_result(const Queue& queue, const ExactSumState* sum, const Result& result) {
  launch_exact(queue, {nullptr, sum, result});
}
void exact_merge(const Queue& queue, ExactSumState* into, const ExactSumState* from) {
  launch_exact(queue, {into, from, {}});
}
void exact_add(const Queue& queue, ExactSumState* into, const float* values, int64_t n) {
  const Work work(queue, 0);
  work.clear();
  launch_reduce<float>(work, Array<float>{values}, n, {nullptr, 1, into, {}, {}});
}

bool elementary(const Queue& queue, const char* name, bool in_double, const void* x, void* y,
                int64_t n) {
  return find_function(ElementaryFunctions{}, name, queue, in_double, x, y, n);
}

}  // namespace mbk::MBK_ISA
