#pragma once
// Runs a row loss on one tier, with its tensors laid out, aliased and reduced as a variant says.
#include <stdlib.h>

#include <string>

#include "core/environment.h"
#include "core/ordered_sum.h"
#include "cpu/dispatch.h"
#include "cpu/row_call.h"
#include "cuda/calls.h"
#include "row_reference.h"

namespace test {

using mbk::DType;

// Where the elements of a tensor of items x columns lie; the gaps belong to nobody.
struct Layout {
  int64_t inner_size;
  mbk::Strides strides;
  int64_t offset(int64_t item, int64_t column) const {
    return item / inner_size * strides.outer + item % inner_size * strides.inner +
           column * strides.column;
  }
};
inline constexpr int kLayouts = 5, kFlatLayouts = 3;
inline Layout layout_of(int kind, const RowProblem& p) {
  const int64_t c = p.columns, n = p.inner;
  switch (kind) {
    case 0:  // (N, C)
      return {1, {c, 0, 1}};
    case 1:  // (N, C) with a pitch
      return {1, {c + 3, 0, 1}};
    case 2:  // every other column
      return {1, {2 * c + 1, 0, 2}};
    case 3:  // (N, C, d)
      return {n, {c * n, 1, n}};
    default:  // (N, C, d) in channels_last
      return {n, {c * n, c, 1}};
  }
}

struct Variant {
  int input_layout = 0, grad_layout = 0;  // both flat, or neither
  bool gradient = true, in_place = false, accumulate = false, from_state = false;
  bool direct = false;  // the kernel alone, with no more scratch than it says it needs
  bool device = false;  // CUDA's kernels, whatever the tier
  int threads = 1;
};

struct Outcome {
  std::vector<uint64_t> grad, losses, state, total;
  double divisor;
};

inline double old_value(size_t element) { return (double)((element * 37) % 101) * 0.03125 - 1.5; }

// A matrix of items x columns, or, with one column, a value an item.
inline Buffer spread_out(const std::vector<double>& values, DType type, const Layout& at,
                         int64_t columns) {
  const int64_t items = columns ? (int64_t)values.size() / columns : 0;
  Buffer b(type, items ? at.offset(items - 1, columns - 1) + 1 : 0);
  for (int64_t i = 0; i < items; ++i)
    for (int64_t j = 0; j < columns; ++j) b.set(at.offset(i, j), values[(size_t)(i * columns + j)]);
  return b;
}
inline std::vector<uint64_t> all_bits(const Buffer& b) {
  std::vector<uint64_t> words;
  for (int64_t i = 0; i < b.size(); ++i) words.push_back(b.bits(i));
  return words;
}

// The same call by the CUDA kernels, where this test is built with them. Returns the divisor.
inline double run_on_device(DType input, const mbk::RowArgs& a, const mbk::Result& r) {
  const int64_t bytes = mbk::cuda::workspace_bytes(a.items, input == DType::f64);
  const Buffer memory(DType::f64, (bytes + 7) / 8);
  char* const workspace = (char*)memory.data();
  mbk::cuda::run_row_loss({nullptr, workspace}, 0, input, a, r);
  double divisor;
  memcpy(&divisor, workspace, sizeof divisor);
  return divisor;
}

inline Outcome run(const mbk::Backend& tier, const RowProblem& p, const Variant& v,
                   const Outcome* base = nullptr) {
  const int64_t items = p.items();
  const DType compute = p.compute(), out = v.accumulate ? compute : p.dtype;
  const Layout at = layout_of(v.input_layout, p), grad_at = layout_of(v.grad_layout, p);
  const Layout one_an_item{at.inner_size, {at.inner_size, 1, 0}};
  const Buffer x = spread_out(p.x, p.dtype, at, p.columns),
               probabilities = spread_out(p.probabilities, p.dtype, grad_at, p.columns),
               class_weight = spread_out(p.class_weight, compute, {1, {1, 0, 0}}, 1),
               sample_weight = spread_out(p.sample_weight, compute, one_an_item, 1),
               item_scale = spread_out(p.item_scale, compute, one_an_item, 1);
  Buffer own_grad(out,
                  v.gradient && !v.in_place ? grad_at.offset(items - 1, p.columns - 1) + 1 : 0);
  const Buffer& grad = v.in_place ? x : own_grad;
  for (int64_t i = 0; v.accumulate && i < items; ++i)
    for (int64_t j = 0; j < p.columns; ++j)
      own_grad.set(grad_at.offset(i, j), old_value((size_t)(i * p.columns + j)));
  Buffer losses(compute, items), state(compute, (p.target.empty() ? 3 : 2) * items);
  Buffer result(compute, 1);
  for (int64_t k = 0; v.from_state && k < state.size(); ++k)
    memcpy((char*)state.data() + k * size_of(compute), &base->state[(size_t)k],
           (size_t)size_of(compute));

  mbk::RowArgs a{};
  a.items = items, a.inner_size = at.inner_size, a.columns = p.columns;
  a.input = x.data(), a.input_strides = at.strides;
  a.grad = v.gradient ? grad.data() : nullptr, a.grad_strides = grad_at.strides;
  a.accumulate = v.accumulate;
  a.target_is_index = !p.target.empty();
  a.target = a.target_is_index ? (const void*)p.target.data() : probabilities.data();
  a.target_strides = a.target_is_index ? one_an_item.strides : grad_at.strides;
  a.ignore_index = p.ignore_index;
  a.class_weight = class_weight.size() ? class_weight.data() : nullptr;
  a.sample_weight = sample_weight.size() ? sample_weight.data() : nullptr;
  a.item_scale = item_scale.size() ? item_scale.data() : nullptr;
  a.sample_weight_strides = a.item_scale_strides = one_an_item.strides;
  a.label_smoothing = p.smoothing, a.z_loss = p.z_loss, a.softcap = p.softcap;
  a.scale = {p.scale, nullptr, DType::f64};
  a.losses = v.from_state ? nullptr : losses.data();
  a.row_state = state.data(), a.from_state = v.from_state;
  a.denominator = {base ? base->divisor : 1, nullptr, DType::f64};
  a.threads = v.threads;
  Outcome o;
  if (v.direct) {
    const mbk::DefaultEnvironment environment;
    const std::unique_ptr<char, void (*)(void*)> scratch(
        (char*)aligned_alloc(64, (size_t)mbk::row_scratch_bytes(p.columns, size_of(compute))),
        free);
    a.scratch = scratch.get();
    const double sum = mbk::host::ordered_sum(  // exact in fp32
        p.columns, [&p](int64_t j) { return p.weight(p.class_weight, j); });
    a.class_weight_sum = {p.smoothing != 0 ? sum : 0, nullptr, DType::f64};
    tier.row(0, p.dtype)(a);
    o.divisor = base->divisor, o.total = base->total;
  } else {
    mbk::ExactSumState sum{};
    mbk::Result r{};
    r.reduction = p.mean ? mbk::Reduction::mean : mbk::Reduction::sum;
    r.loss = result.data(), r.loss_dtype = compute;
    r.loss_sum = compute == DType::f32 ? &sum : nullptr;
    o.divisor = v.device ? run_on_device(p.dtype, a, r) : mbk::run_row_loss(tier, 0, p.dtype, a, r);
    for (const int64_t limb : sum.limb) o.total.push_back((uint64_t)limb);
    o.total.push_back(result.bits(0));
  }
  o.losses = all_bits(losses), o.state = all_bits(state);
  std::vector<bool> inside((size_t)grad.size());
  for (int64_t i = 0; v.gradient && i < items; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      o.grad.push_back(grad.bits(grad_at.offset(i, j)));
      inside[(size_t)grad_at.offset(i, j)] = true;
    }
  for (int64_t k = 0; v.gradient && k < grad.size(); ++k)
    CHECK(inside[(size_t)k] || grad.bits(k) == grad.poison(), "the gap at %lld was written",
          (long long)k);
  return o;
}

inline std::string describe(const RowProblem& p, const mbk::Backend& tier, const Variant& v) {
  char text[240];
  snprintf(text, sizeof text,
           "%s %s (%lld, %lld, %lld)%s smoothing %g cap %g z %g, layouts %d %d%s%s%s%s threads %d",
           tier.name, name_of(p.dtype), (long long)p.outer, (long long)p.columns,
           (long long)p.inner, p.target.empty() ? " probabilities" : "", p.smoothing, p.softcap,
           p.z_loss, v.input_layout, v.grad_layout, v.in_place ? " in place" : "",
           v.accumulate ? " accumulate" : "", v.from_state ? " from state" : "",
           v.device   ? " on the device"
           : v.direct ? " direct"
                      : "",
           v.threads);
  return text;
}

inline void compare(const char* what, const std::vector<uint64_t>& got,
                    const std::vector<uint64_t>& want, const std::string& where) {
  CHECK(got.size() == want.size(), "%s: %zu %s, not %zu", where.c_str(), got.size(), what,
        want.size());
  for (size_t k = 0; k < got.size() && k < want.size(); ++k)
    if (got[k] != want[k]) {
      CHECK(false, "%s: %s %zu is %llx, not %llx", where.c_str(), what, k,
            (unsigned long long)got[k], (unsigned long long)want[k]);
      return;
    }
}

}  // namespace test
