#include "cpu/list_call.h"

#include <cmath>
#include <vector>

#include "core/block_sum.h"
#include "core/dtype.h"
#include "core/environment.h"
#include "cpu/reduction.h"

namespace mbk {

using namespace mbk::MBK_ISA;

namespace {

Scalar known(const Scalar& s) { return {read_scalar(s), nullptr, DType::f64}; }

double tensor_sum(const ListTensor& t, const double* blocks) {
  const double* const first = blocks + t.first_block;
  return canonical(block_sum(list_blocks(t.size), [first](int64_t b) { return first[b]; }));
}

// The sum over all tensors; those of each, if wanted.
double list_sum(const TensorList& list, const double* blocks, double* tensors) {
  std::vector<double> own;
  if (!tensors) {
    own.resize(static_cast<size_t>(list.count));
    tensors = own.data();
  }
  for (int64_t t = 0; t < list.count; ++t) tensors[t] = tensor_sum(list.tensors[t], blocks);
  return canonical(block_sum(list.count, [tensors](int64_t t) { return tensors[t]; }));
}

}  // namespace

void run_accumulate(const Backend& backend, AccumulateArgs a, double* squares) {
  const DefaultEnvironment environment;
  // Read before anything is written: they may lie in a buffer's memory.
  a.alpha = known(a.alpha), a.beta = known(a.beta);
  std::vector<double> blocks(squares ? static_cast<size_t>(a.list.blocks) : 0);
  a.squares = squares ? blocks.data() : nullptr;
  backend.accumulate(a);
  if (!squares) return;
  for (int64_t t = 0; t < a.list.count; ++t) squares[t] = tensor_sum(a.list.tensors[t], a.squares);
}

void run_flush(const Backend& backend, FlushArgs a, double max_norm, double* stats,
               double* squares) {
  const DefaultEnvironment environment;
  for (Scalar* s : {&a.factor, &a.denominator, &a.grad_scale}) *s = known(*s);
  bool has_penalty = false;
  for (int64_t t = 0; t < a.list.count; ++t)
    has_penalty = has_penalty || a.list.tensors[t].l1 != 0 || a.list.tensors[t].l2 != 0;
  const size_t blocks = static_cast<size_t>(a.list.blocks);
  std::vector<double> sums(blocks * (has_penalty ? 2 : 1));
  a.squares = sums.data();
  a.penalties = has_penalty ? sums.data() + blocks : nullptr;
  a.clip = nullptr;
  const bool clips = max_norm < HUGE_VAL;
  a.write = !clips;
  backend.flush(a);
  const double total = list_sum(a.list, a.squares, squares);
  stats[kNorm] = std::sqrt(total);
  stats[kNonFinite] = total < HUGE_VAL ? 0 : 1;
  stats[kClip] = clips ? clip_factor(stats[kNorm], max_norm) : 1;
  stats[kPenalty] = has_penalty ? list_sum(a.list, a.penalties, nullptr) : 0;
  if (!clips) return;
  a.squares = a.penalties = nullptr;
  a.clip = &stats[kClip];
  a.write = true;
  backend.flush(a);
}

}  // namespace mbk
