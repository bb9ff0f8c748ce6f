// The products of cpu/product.cpp with the same bits, for split-invariant heads on CUDA: plain
// fused multiply-adds in fp32 (fp64), no tensor cores, whose order of summation nobody documents.
// It is there to verify, and to be exact, not to be fast: about 1/8 of what the device could do
// in fp32, since every operand of an operation comes from shared memory.
#include "core/product_args.h"
#include "cuda/calls.h"
#include "cuda/reduce_launch.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int kTile = 16, kProductThreads = kTile * kTile;

struct ProductLaunch {
  ProductArgs args;
  int64_t tiles_down, tiles_across;
};

template <class T>
MBK_DEVICE T element(const Operand& o, int64_t k, int64_t i) {
  const int64_t at = k * o.depth_stride + i * o.stride;
  switch (o.dtype) {
    case DType::bf16:
      return (T)widen(((const bf16*)o.data)[at]);
    case DType::f16:
      return (T)widen(((const f16*)o.data)[at]);
    case DType::f64:
      return (T)((const double*)o.data)[at];
    default:
      return (T)((const float*)o.data)[at];
  }
}

// A thread has one element of C.
template <class T>
__global__ void __launch_bounds__(kProductThreads)
    product(const __grid_constant__ ProductLaunch launch) {
  const ProductArgs& p = launch.args;
  T* const a = shared_memory<T>();  // [depth][row]
  T* const b = a + kTile * kTile;   // [depth][column]
  const int row = threadIdx.x / kTile, column = threadIdx.x % kTile;
  const bool blocks = p.order == ProductOrder::blocks;
  for (int64_t t = blockIdx.x; t < launch.tiles_down * launch.tiles_across; t += gridDim.x) {
    const int64_t top = t / launch.tiles_across * kTile, left = t % launch.tiles_across * kTile;
    const int64_t i = top + row, j = left + column;
    const bool inside = i < p.rows && j < p.columns;
    T* const c = (T*)p.c + i * p.c_stride + j;
    T start = 0;
    if (inside && !p.from_zero) start = *c;
    T sum = blocks ? (T)0 : start;
    for (int64_t k = 0; k < p.depth; k += kTile) {
      const int64_t depth = k + row;  // here rows of threads go down the depth
      const bool deep = depth < p.depth;
      a[row * kTile + column] =
          deep && top + column < p.rows ? element<T>(p.a, depth, top + column) : (T)0;
      b[row * kTile + column] =
          deep && left + column < p.columns ? element<T>(p.b, depth, left + column) : (T)0;
      __syncthreads();
      const int count = p.depth - k < kTile ? (int)(p.depth - k) : kTile;
      for (int s = 0; s < count; ++s)
        sum = multiply_add(a[s * kTile + row], b[s * kTile + column], sum);
      if (blocks && (k + kTile) % kProductBlock == 0) {
        start = start + sum;
        sum = 0;
      }
      __syncthreads();
    }
    // Of blocks the last is added here, but where its last tile, perhaps not a whole one, was the
    // last of 256 rows: adding 0 to what is there would turn -0 into +0.
    const int64_t tiles = (p.depth + kTile - 1) / kTile;
    if (blocks) sum = tiles % (kProductBlock / kTile) ? start + sum : start;
    if (inside) *c = canonical(sum);
  }
}
static_assert(kProductBlock % kTile == 0);

template <class T>
void launch_product(const Queue& queue, const ProductArgs& args) {
  const ProductLaunch p{args, (args.rows + kTile - 1) / kTile, (args.columns + kTile - 1) / kTile};
  const int64_t tiles = p.tiles_down * p.tiles_across;
  if (!tiles) return;
  const unsigned grid = static_cast<unsigned>(
      std::min<int64_t>(tiles, int64_t{8} * current_device().multiprocessors));
  check(launch(&product<T>, p, grid, kProductThreads, 1, 2 * kTile * kTile * sizeof(T),
               stream_of(queue)),
        "launching a product");
}

}  // namespace

bool run_product(const Queue& queue, const ProductArgs& args) {
  if (args.order == ProductOrder::pairs) return false;
  if (args.c_dtype == DType::f64) {
    if (args.a.dtype != args.b.dtype) return false;
    launch_product<double>(queue, args);
  } else {
    launch_product<float>(queue, args);
  }
  return true;
}

}  // namespace mbk::MBK_ISA
