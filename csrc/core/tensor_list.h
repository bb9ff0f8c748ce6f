#pragma once
// Element-wise work over many tensors in one call: gradients that are added into buffers, and
// buffers that are flushed into gradients. All elements of a list are cut into blocks, numbered
// through all tensors; a block never spans two tensors.
#include "core/args.h"

namespace mbk {

inline constexpr int kListBlock = 4096;

inline constexpr int64_t list_blocks(int64_t size) { return (size + kListBlock - 1) / kListBlock; }

// What an element-wise call reads and writes of one tensor. The buffer comes first: its memory
// order is the order of the walk, and so of the sums.
enum ListView { kBuffer, kListGrad, kListParameter, kListLow, kListViews };

struct ListTensor : Walk {
  int64_t first_block;
  View views[kListViews];
  double l1, l2;  // of the flush: the penalty l1 |p| + l2 / 2 p^2 of every element
  uint64_t key;   // of the accumulation into bf16 without a low part: which numbers it rounds by
  // Whether element i of every view lies i elements behind the first.
  bool dense() const {
    bool all = dims == 1;
    for (const View& v : views) all = all && (!v.data || v.strides[0] == 1);
    return all;
  }
};

struct TensorList {
  const ListTensor* tensors;
  int64_t count, blocks;
};

// buffer = beta * buffer + alpha * grad; with beta = 0 the buffer is not read. A buffer of bf16 is
// the high part of a pair, or is rounded to by chance: see Bf16Accumulation.
struct AccumulateArgs {
  TensorList list;
  Scalar alpha, beta;
  double* squares;  // of the gradients, one number a block; null: not wanted
  int threads;
};

// v = scale * buffer + l2 * p + l1 * sign(p), and grad = clip * v, in the gradient's type. A buffer
// of bf16 is taken with its low part, if it has one.
//   scale = factor / (denominator * grad_scale); 0 where the denominator is 0
struct FlushArgs {
  TensorList list;
  Scalar factor, denominator, grad_scale;
  const double* clip;  // null: 1
  double* squares;     // of v, one number a block; null: not wanted
  double* penalties;   // one number a block; null: no tensor has a penalty
  bool write;          // the gradients; else only the sums
  int threads;
};

// What a flush reports, in this order.
enum FlushStat { kNorm, kClip, kNonFinite, kPenalty, kFlushStats };

}  // namespace mbk
