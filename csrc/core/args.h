#pragma once
// Plain data that crosses from the binding to the kernels, on every device. Strides are in
// elements.
#include <stdint.h>

namespace mbk {

// Storage types of floating tensors and of class indices; the values index the dispatch tables.
enum class DType : int32_t { f32, bf16, f16, f64 };
enum class IndexType : int32_t { i64, i32, i16, i8, u8 };
inline constexpr int kDTypes = 4;

// A number known to the caller, or one that stays where it is and is read when the kernel runs.
struct Scalar {
  double value;
  const void* pointer;  // null: use value
  DType dtype;          // of *pointer
};

// An exact sum of fp32 numbers: 288 bits of fixed point in nine limbs of 32 bits (each in an int64,
// so that additions need no carry), and a count for each kind of term that is not a number to be
// summed. Plain integers: merging is addition, in any order, over threads, devices and processes.
struct ExactSumState {
  int64_t limb[9];  // value = sum limb[i] * 2^(32 i - 149)
  int64_t nan, positive_infinity, negative_infinity;
};
static_assert(sizeof(ExactSumState) == 96, "documented size");

// Items are numbered i = outer * inner_size + inner: (N, C, d1, d2) has N * d1 * d2 items of C
// columns.
struct Strides {
  int64_t outer, inner, column;
};

struct RowArgs {
  int64_t items, inner_size, columns;

  const void* input;
  Strides input_strides;
  void* grad;  // null: not wanted. Element type: the input's, or fp32 (fp64) with accumulate
  Strides grad_strides;
  bool accumulate;  // grad += d, instead of grad = d

  const void*
      target;  // class indices (column stride unused), or probabilities in the input's dtype
  bool target_is_index;
  IndexType target_type;
  Strides target_strides;
  int64_t ignore_index;

  // Options. Arrays are in the type that the loss is computed in: fp32, or fp64 for fp64 input.
  const void* class_weight;   // (columns), null: all one
  Scalar class_weight_sum;    // of all classes; used with label smoothing
  const void* sample_weight;  // one an item, null: all one
  Strides sample_weight_strides;
  double label_smoothing, z_loss, softcap;  // softcap 0: none

  // d(result)/d(item) = scale * item_scale / denominator
  Scalar scale, denominator;
  const void* item_scale;  // one an item, in the type that the loss is computed in; null: all one
  Strides item_scale_strides;

  void* losses;     // per item, contiguous, in the type that the loss is computed in; may be null
  void* row_state;  // (2, items): the row's maximum, and the sum of the other terms; may be null
  bool from_state;  // read row_state instead of computing it: the backward half

  int threads;
  ExactSumState* totals;  // one a thread; null: the total is not wanted (and always null for fp64)
  char* scratch;          // row_scratch_bytes() a thread
};

// Work that is worth a thread of its own.
inline constexpr int64_t kElementsPerTask = 32768;

// Whether the lanes of a CPU kernel go across items instead of along the row: short rows, and
// layouts where neighbouring items are neighbours in memory. Changes the speed, not one bit of the
// result.
inline constexpr int64_t kShortColumns = 512, kShortContiguousColumns = 100;
inline bool lanes_across_items(const RowArgs& a) {
  return a.columns <= (a.input_strides.column == 1 ? kShortContiguousColumns : kShortColumns);
}

// Scratch of one thread for rows of `columns`, of a type of `size` bytes: the row itself, rounded
// up to whole groups, and copies of the input, the probabilities and the gradient should those be
// strided; or two tiles of vectors of items. Memory that is not touched costs nothing: a plain call
// uses one row.
inline constexpr int64_t row_scratch_bytes(int64_t columns, int64_t size) {
  const int64_t rows = (columns + 63) / 64 * 64 * size * 4,
                tiles = columns <= kShortColumns ? columns * 64 * 3 : 0;
  return (rows > tiles ? rows : tiles) + 64;
}

inline constexpr int kParameters = 4;  // numbers that a loss may have of its own

// Element-wise losses. Every tensor of a call is a view of the broadcast shape, whose dimensions
// the binding has sorted and merged; a view that is absent has no data.
inline constexpr int kMaxDims = 8;
enum PointwiseView {
  kInput,       // then the other inputs: the target, and a third one
  kWeight = 3,  // of an element in the mean
  kRescale,     // multiplies an element's loss, and does not count in the mean
  kItemScale,
  kLosses,
  kGrad,  // of each of the inputs
  kViews = kGrad + 3
};
inline constexpr int kPointwiseInputs = 3;  // at most

struct View {
  void* data;
  DType dtype;
  int64_t strides[kMaxDims];  // 0: broadcast
};

// The order in which the elements of a call are walked: its dimensions, outermost first.
struct Walk {
  int64_t size;
  int dims;
  int64_t shape[kMaxDims];
};

struct PointwiseArgs : Walk {
  View views[kViews];
  bool accumulate;                 // gradients are added to what is there
  double parameters[kParameters];  // the loss's own: beta, delta, margin
  // d(result)/d(element) = scale * item_scale * weight * rescale / denominator
  Scalar scale, denominator;

  int threads;
  ExactSumState* totals;  // one a thread; null: the total is not wanted, or computed in fp64:
  double* partial_sums;   // one for each kPointwiseBlock elements
};

// Losses of several rows an item: up to three tensors of one shape, whose storage types may differ;
// fp64 is computed in if any is fp64. `input` and `grad` of the base are not used. Per-item arrays
// and class weights are in the type that is computed in. `class_weight` is that of the target, or
// of every column, as the loss has it.
inline constexpr int kMaxRows = 3, kRowParameters = 4;
struct RowTensor {
  void* data;  // null: absent, or a gradient that is not wanted
  DType dtype;
  Strides strides;
};
enum class ItemTarget : int32_t {
  none,
  index,   // a class an item; the loss may do without
  number,  // a floating number an item
  list     // a row of classes an item, up to the first -1
};
struct MultirowArgs : RowArgs {
  RowTensor inputs[kMaxRows];
  RowTensor grads[kMaxRows];  // with accumulate, fp32 or fp64
  RowTensor label;            // of ItemTarget::number
  double parameters[kRowParameters];
};

// Scratch of one thread: rows of values kept from one pass to the next, in whole groups; or tiles
// of vectors of items, for all rows, gradients and kept values.
inline constexpr int64_t multirow_scratch_bytes(int64_t columns, int64_t size) {
  const int64_t rows = (columns + 63) / 64 * 64 * size * kMaxRows,
                tiles = columns <= kShortColumns ? columns * 64 * 8 : 0;
  return (rows > tiles ? rows : tiles) + 64;
}

// Elements that a task of the element-wise loops covers; fp64 sums are taken block by block, in
// order.
inline constexpr int64_t kPointwiseBlock = 16384;

}  // namespace mbk
