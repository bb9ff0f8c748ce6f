#include "cpu/multirow_call.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/environment.h"
#include "core/ordered_sum.h"
#include "cpu/row_call.h"
#include "losses/all.h"

namespace mbk {

using namespace mbk::MBK_ISA;

namespace {

// Rows of classes, each up to its first -1; as in torch what comes after must be classes, too.
void check_lists(const MultirowArgs& a) {
  for (int64_t i = 0; i < a.items; ++i) {
    const ItemPosition at(a, i);
    for (int64_t j = 0; j < a.columns; ++j) {
      const int64_t value = read_index(a.target, a.target_type,
                                       at.offset(a.target_strides) + j * a.target_strides.column);
      if (value == -1) continue;
      if (value < 0 || value >= a.columns)
        throw std::out_of_range(
            "mbkern: target " + std::to_string(value) + " at flat index " +
            std::to_string((at.outer * a.columns + j) * a.inner_size + at.inner) +
            " is out of bounds: it is neither in [0, " + std::to_string(a.columns) +
            ") nor -1, the end of a list");
    }
  }
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};

template <class T>
double run(const Backend& backend, int loss, MultirowArgs a, const Result& result) {
  const DefaultEnvironment environment;
  const MultirowTraits& traits = multirow_traits(loss);
  traits.prepare(a);
  // Each thread has its scratch: no more of them than items.
  a.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.items, a.threads)));
  RowArgs weighed = a;
  weighed.target_is_index = traits.target == ItemTarget::index && a.target;
  if (!traits.weighs_divisor) weighed.class_weight = nullptr;
  if (traits.target == ItemTarget::list) check_lists(a);
  const double weights = check_and_weigh(weighed, sizeof(T) == 8 ? DType::f64 : DType::f32);
  const double divisor = divisor_of(result, weights);
  a.denominator = {divisor, nullptr, DType::f64};
  // Read before anything is written: it may lie in a gradient's memory.
  a.scale = {read(a.scale), nullptr, DType::f64};

  ThreadTotals totals(a.threads);
  std::vector<T> losses;
  const bool reduces = result.reduction != Reduction::none || result.loss_sum;
  if constexpr (sizeof(T) == 4) {
    if (reduces) a.totals = totals.data();
  } else if (reduces && !a.losses) {
    losses.resize(static_cast<size_t>(a.items));
    a.losses = losses.data();
  }
  constexpr size_t kAlignment = 64;
  const size_t scratch =
      static_cast<size_t>(multirow_scratch_bytes(a.columns, sizeof(T))) * a.threads;
  alignas(kAlignment) char small[8192];
  std::unique_ptr<char, Free> large;
  if (scratch > sizeof small) {
    large.reset(static_cast<char*>(
        std::aligned_alloc(kAlignment, (scratch + kAlignment - 1) / kAlignment * kAlignment)));
    if (!large) throw std::bad_alloc();
  }
  a.scratch = large ? large.get() : small;

  if (a.items > 0) backend.multirow(loss, sizeof(T) == 8 ? DType::f64 : DType::f32)(a);

  if constexpr (sizeof(T) == 4) {
    const ExactSumState total = totals.merged();
    if (result.loss_sum) exact_merge(*result.loss_sum, total);
    store_result(result, total, divisor);
  } else if (reduces) {
    const double* terms = static_cast<const double*>(a.losses);
    store_result(result, ordered_sum(a.items, [terms](int64_t i) { return terms[i]; }), divisor);
  }
  return divisor;
}

}  // namespace

double run_multirow_loss(const Backend& backend, int loss, DType type, MultirowArgs args,
                         const Result& result) {
  return type == DType::f64 ? run<double>(backend, loss, args, result)
                            : run<float>(backend, loss, args, result);
}

}  // namespace mbk
