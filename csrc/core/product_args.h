#pragma once
// C (+)= A^T B, every element of C by one chain of fused multiply-adds: see cpu/product.cpp.
#include "core/args.h"

namespace mbk {

// A matrix whose elements are read once each, while they are packed. Strides are in elements.
struct Operand {
  const void* data;
  DType dtype;
  int64_t depth_stride;  // of the dimension that is summed over
  int64_t stride;        // of C's rows, or of its columns
};

enum class ProductOrder : int32_t {
  chain,   // c = fma(a_k, b_k, c), k ascending; fp64: two roundings
  blocks,  // chains from 0 over aligned blocks of kProductBlock, added to c in order
  pairs    // of bf16 only: two terms at a time by AVX512-BF16; not the same bits as the others
};

struct ProductArgs {
  int64_t rows, columns, depth;
  Operand a, b;  // (depth, rows) and (depth, columns)
  void* c;       // (rows, columns), columns contiguous: fp32, or fp64 where an operand is fp64
  DType c_dtype;
  int64_t c_stride;
  bool from_zero;  // c starts at 0, not at what it holds
  ProductOrder order;
  // Runs of the depth are left out for rows of a tile in which all of A is smaller; 0: none are.
  double skip_below;
  int threads;
  char* scratch;  // kProductScratch bytes a thread, aligned to 64
};

// The blocks in which sums over classes are taken, so that shards of classes give the same sums.
inline constexpr int64_t kProductBlock = 256;

// Of one thread: columns of B for a run of the depth, and a strip of A.
inline constexpr int64_t kProductScratch = (1 << 20) + (1 << 17);

}  // namespace mbk
