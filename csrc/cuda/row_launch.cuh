#pragma once
// What the kernels of row losses share: their parameters, and how an item is described.
#include "core/row_items.h"
#include "cuda/workspace.cuh"

namespace mbk::MBK_ISA {

struct RowLaunch {
  RowArgs args;
  Result result;
  Workspace* work;
  TargetErrors* errors;
  bool totals;  // the sum of the losses is wanted
  bool weigh;   // every block adds up the weights of the items, few as they are, for the divisor
  // Of team_rows: a row is the work of `teams` in each of the `cluster` blocks; a block has
  // 1 << (log2 of teams) of them a row where it has several rows.
  int teams, team_shift, cluster, rows_of_block;
  int64_t row_step, waves;
};

// A class index out of range: the first that is seen is kept, all are counted.
MBK_DEVICE void note_bad_target(const RowLaunch& p, int64_t item, int64_t value) {
  if (atomicAdd((unsigned long long*)&p.errors->count, 1ull) != 0) return;
  p.errors->item = item;
  p.errors->value = value;
  p.errors->columns = p.args.columns;
}

// How the gradient of an item comes about: from its logits, or one number for every column.
enum class ItemKind { plain, ignored, bad };

template <class Loss>
MBK_DEVICE ItemKind describe_item(const RowArgs& a, const ItemPosition& at, int64_t& target) {
  target = -1;
  if constexpr (Loss::kHasIndex) {
    target = read_index(a.target, a.target_type, at.offset(a.target_strides));
    if (target == a.ignore_index) return ItemKind::ignored;
    if ((uint64_t)target >= (uint64_t)a.columns) return ItemKind::bad;
  }
  return ItemKind::plain;
}

template <class T>
MBK_DEVICE T* row_state(const RowArgs& a, int64_t item, int which) {
  return (T*)a.row_state + which * a.items + item;
}

// Asks for a line of the second-level cache.
MBK_DEVICE void prefetch(const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#endif
  (void)p;
}

// What the backward half needs of an item.
template <class Loss, class T>
MBK_DEVICE void save_state(const RowArgs& a, int64_t i,
                           const typename Loss::template Item<double>& item, ItemKind kind) {
  if (!a.row_state) return;
  const T nan = canonical((T)__builtin_nanf(""));
  const double saved[3] = {item.max, item.sums[0], item.sums[2]};
#pragma unroll
  for (int k = 0; k < (Loss::kSums > 2 ? 3 : 2); ++k)
    *row_state<T>(a, i, k) = kind == ItemKind::plain ? (T)saved[k]
                             : kind == ItemKind::bad ? nan
                                                     : (T)0;
}

// The loss of an item, in fp64 from the end of its row, rounded once.
template <class Loss, class T>
MBK_DEVICE T item_loss(const typename Loss::template Call<T>& call,
                       const typename Loss::template Item<double>& item, double sample_weight,
                       ItemKind kind) {
  if (kind == ItemKind::ignored) return 0;
  if (kind == ItemKind::bad) return canonical((T)__builtin_nanf(""));
  return canonical((T)(Loss::loss(call, item, Loss::log_sum(item)) * sample_weight));
}

// The divisor of the mean, by whole blocks; in thread 0. `state` is shared memory, zero before and
// after.
MBK_DEVICE double divisor_of_rows(const RowLaunch& p, ExactSumState& state) {
  if (!p.weigh) return read(p.args.denominator);
  ThreadSum sum;
  for (int64_t i = threadIdx.x; i < p.args.items; i += blockDim.x)
    sum.add(item_weight<float>(p.args, i), state);
  sum.flush_warp(state);
  __syncthreads();
  double divisor = 0;
  if (threadIdx.x == 0) {
    divisor = round_in_place(state, false);
    clear(state);
  }
  __syncthreads();
  return divisor;
}

// The end of a kernel of row losses, by whole blocks: the block's total joins the others, and the
// last block stores the result. `total` is shared memory, one state a block, complete.
MBK_DEVICE void finish_rows(const RowLaunch& p, double divisor, ExactSumState& total, int* shared) {
  const bool alone = gridDim.x == 1;
  if (p.totals && threadIdx.x == 0) {
    normalise(total);
    if (!alone) merge_atomically(p.work->total, total);
  }
  if (!is_last_block(&p.work->losses_done, shared) || threadIdx.x != 0) return;
  if (p.totals) {
    if (!alone) read_state(total, p.work->total);
    finish(p.result, total, divisor);
  }
  p.work->divisor = divisor;
}

}  // namespace mbk::MBK_ISA
