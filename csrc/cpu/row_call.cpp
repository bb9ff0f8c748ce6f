#include "cpu/row_call.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/environment.h"
#include "core/exact_sum.h"
#include "core/ordered_sum.h"
#include "cpu/parallel.h"

namespace mbk {

using namespace mbk::MBK_ISA;

namespace {

[[noreturn]] void refuse_target(const RowArgs& a, int64_t item) {
  const ItemPosition at(a, item);
  const int64_t value = read_index(a.target, a.target_type, at.offset(a.target_strides));
  const std::string classes = "in [0, " + std::to_string(a.columns) + ")";
  const bool ignores = a.ignore_index != std::numeric_limits<int64_t>::min();  // or it is no class
  throw std::out_of_range(
      "mbkern: target " + std::to_string(value) + " at flat index " + std::to_string(item) +
      " is out of bounds: it is " +
      (ignores ? "neither " + classes + " nor ignore_index (" + std::to_string(a.ignore_index) + ")"
               : "not " + classes));
}

// Of items [begin, end): how many are not ignored, and the first whose target is no class; `end`
// if there is none.
struct Targets {
  int64_t counted, bad;
};
Targets examine_targets(const RowArgs& a, int64_t begin, int64_t end) {
  return with_index(a.target, a.target_type, [&](auto* targets) {
    const auto is_bad = [&a](int64_t target) {
      return target != a.ignore_index &&
             static_cast<uint64_t>(target) >= static_cast<uint64_t>(a.columns);
    };
    int64_t ignored = 0, outside = 0;
    ItemPosition at(a, begin);
    for (int64_t i = begin; i < end; ++i, at.advance(a)) {
      const int64_t target = targets[at.offset(a.target_strides)];
      ignored += target == a.ignore_index;
      outside += is_bad(target);
    }
    if (!outside) return Targets{end - begin - ignored, end};
    int64_t bad = begin;
    for (at = ItemPosition(a, begin); !is_bad(targets[at.offset(a.target_strides)]); at.advance(a))
      ++bad;
    return Targets{0, bad};
  });
}

// Checks every class index and adds up the weights: exactly for fp32, in the fixed order for fp64.
template <class T>
double check_and_weigh_as(const RowArgs& a) {
  const bool weighted = (a.class_weight && a.target_is_index) || a.sample_weight;
  if (!a.target_is_index && !weighted) return static_cast<double>(a.items);
  std::atomic<int64_t> bad{a.items};
  std::atomic<int64_t> count{0};
  ThreadTotals totals(weighted ? a.threads : 1);
  auto body = [&](int64_t begin, int64_t end, int thread) {
    if (a.target_is_index) {
      const Targets targets = examine_targets(a, begin, end);
      int64_t first = bad.load();
      while (targets.bad < end && targets.bad < first &&
             !bad.compare_exchange_weak(first, targets.bad)) {
      }
      count += targets.counted;
    }
    if (!weighted || bad < a.items) return;
    if constexpr (sizeof(T) == 4) {
      for (int64_t i = begin; i < end; ++i) add(totals.data()[thread], item_weight<T>(a, i));
      normalise(totals.data()[thread]);
    }
  };
  parallel_for(a.items, kElementsPerTask, a.threads, body);
  if (bad < a.items) refuse_target(a, bad);
  if (!weighted) return static_cast<double>(count);
  if constexpr (sizeof(T) == 4) return exact_value(totals.merged());
  return ordered_sum(a.items, [&a](int64_t i) { return (double)item_weight<T>(a, i); });
}

template <class T>
double sum_of_class_weights(const RowArgs& a) {
  const DefaultEnvironment environment;
  if (!a.class_weight) return static_cast<double>(a.columns);
  const T* w = static_cast<const T*>(a.class_weight);
  if constexpr (sizeof(T) == 8) {
    return ordered_sum(a.columns, [w](int64_t j) { return w[j]; });
  } else {
    ExactSumState sum{};
    exact_add(sum, w, a.columns);
    return exact_value(sum);
  }
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};

template <class T>
double run(const Backend& backend, int loss, DType input, RowArgs a, const Result& result) {
  const DefaultEnvironment environment;
  // Each thread has its scratch: no more of them than items.
  a.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.items, a.threads)));
  const double weights = a.from_state ? 0 : check_and_weigh_as<T>(a);
  const double divisor = a.from_state ? read(a.denominator) : divisor_of(result, weights);
  a.denominator = {divisor, nullptr, DType::f64};
  // Read before anything is written: it may lie in the gradient's memory.
  a.scale = {read(a.scale), nullptr, DType::f64};
  a.class_weight_sum = {a.label_smoothing != 0 ? sum_of_class_weights<T>(a) : 0, nullptr,
                        DType::f64};

  ThreadTotals totals(a.threads);
  std::vector<T> losses;
  const bool reduces = result.reduction != Reduction::none || result.loss_sum;
  if constexpr (sizeof(T) == 4) {
    if (reduces && !a.from_state) a.totals = totals.data();
  } else if (reduces && !a.losses) {
    losses.resize(static_cast<size_t>(a.items));
    a.losses = losses.data();
  }
  constexpr size_t kAlignment = 64;
  const size_t scratch = static_cast<size_t>(row_scratch_bytes(a.columns, sizeof(T))) * a.threads;
  alignas(kAlignment) char small[12288];
  std::unique_ptr<char, Free> large;
  if (scratch > sizeof small) {
    large.reset(static_cast<char*>(
        std::aligned_alloc(kAlignment, (scratch + kAlignment - 1) / kAlignment * kAlignment)));
    if (!large) throw std::bad_alloc();
  }
  a.scratch = large ? large.get() : small;

  if (a.items > 0) backend.row(loss, input)(a);

  if (a.from_state) return divisor;
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

double check_and_weigh(const RowArgs& args, DType type) {
  return type == DType::f64 ? check_and_weigh_as<double>(args) : check_and_weigh_as<float>(args);
}

double run_row_loss(const Backend& backend, int loss, DType input, RowArgs args,
                    const Result& result) {
  return input == DType::f64 ? run<double>(backend, loss, input, args, result)
                             : run<float>(backend, loss, input, args, result);
}

}  // namespace mbk
