// Losses of several rows an item over storage types, layouts, options, tiers, threads and cuts: the
// same bits everywhere, near plain formulas in long double and their differences, and nothing read
// or written that is not their own.
#include <math.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"
#include "core/row_items.h"
#include "cpu/dispatch.h"
#include "cpu/multirow_call.h"
#include "cuda/calls.h"
#include "multirow_reference.h"

namespace test {
namespace {

struct Variant {
  bool plain = true;  // every row dense
  bool in_place = false, accumulate = false;
  int threads = 1;
  bool device = false;  // CUDA's kernels, whatever the tier
  bool cut = false;     // one call an item
};
struct Outcome {
  std::vector<uint64_t> losses, grad[kRows], total;
  double divisor;
};

double old_value(size_t i) { return (double)((i * 37) % 101) * 0.03125 - 1.5; }

struct Placed {
  mbk::Strides strides{};
  std::unique_ptr<Buffer> memory;
  int64_t offset(const Problem& p, int64_t item, int64_t column) const {
    return item / p.inner * strides.outer + item % p.inner * strides.inner +
           column * strides.column;
  }
};
// layout 0: rows one after the other; 1: with gaps; 2: with gaps between columns; 3: (N, C, H).
Placed place(const Problem& p, DType type, int64_t columns, int layout) {
  Placed q;
  const int64_t step = layout == 2 ? 2 : 1, row = layout ? columns * step + 3 : columns;
  q.strides = {row * p.inner, row, step};
  if (layout == 3) q.strides = {p.inner * columns + 2, 1, p.inner};
  q.memory.reset(new Buffer(type, q.offset(p, p.items() - 1, columns - 1) + 1));
  return q;
}
Placed place(const Problem& p, DType type, int64_t columns, int layout,
             const std::vector<double>& values) {
  Placed q = place(p, type, columns, layout);
  for (int64_t i = 0; i < p.items(); ++i)
    for (int64_t j = 0; j < columns; ++j)
      q.memory->set(q.offset(p, i, j), values[(size_t)(i * columns + j)]);
  return q;
}

double call(const mbk::Backend& tier, const Problem& p, const Variant& v,
            const mbk::MultirowArgs& a, const mbk::Result& r) {
  if (!v.device) return mbk::run_multirow_loss(tier, p.loss, p.compute(), a, r);
  const int64_t bytes = mbk::cuda::workspace_bytes(a.items, p.compute() == DType::f64);
  const Buffer workspace(DType::f64, (bytes + 7) / 8);
  mbk::cuda::run_multirow_loss({nullptr, workspace.data()}, p.loss, p.compute(), a, r);
  return workspace.get(0);
}

Outcome run(Random& r, const mbk::Backend& tier, const Problem& p, const Variant& v) {
  const auto& t = traits(p.loss);
  const DType compute = p.compute();
  const auto layout = [&] { return v.plain ? 0 : (int)r.below(4); };
  mbk::MultirowArgs a{};
  a.items = p.items(), a.inner_size = p.inner, a.columns = p.columns, a.threads = v.threads;
  Placed x[kRows], grad[kRows], weights[2], label;
  const bool same[kRows] = {v.in_place, v.in_place && r.one_in(2), false};
  for (int k = 0; k < t.inputs; ++k) {
    x[k] = place(p, p.type[k], p.columns, layout(), p.x[k]);
    a.inputs[k] = {x[k].memory->data(), p.type[k], x[k].strides};
    if (!p.wanted[k]) continue;
    const DType type = v.accumulate ? compute : p.type[k];
    grad[k] = place(p, type, p.columns, layout());
    for (int64_t i = 0; v.accumulate && i < p.items(); ++i)
      for (int64_t j = 0; j < p.columns; ++j)
        grad[k].memory->set(grad[k].offset(p, i, j), old_value((size_t)(i * p.columns + j)));
    a.grads[k] = {grad[k].memory->data(), type, grad[k].strides};
    if (same[k]) a.grads[k] = a.inputs[k];
  }
  const auto per_item = [&](Placed& q, const std::vector<double>& values, DType type,
                            mbk::Strides& strides) -> const void* {
    if (values.empty()) return nullptr;
    q = place(p, type, 1, layout() % 2, values);
    strides = q.strides;
    return q.memory->data();
  };
  a.sample_weight = per_item(weights[0], p.sample_weight, compute, a.sample_weight_strides);
  a.item_scale = per_item(weights[1], p.item_scale, compute, a.item_scale_strides);
  a.label.data = const_cast<void*>(per_item(label, p.label, DType::f32, a.label.strides));
  Buffer class_weight(compute, (int64_t)p.class_weight.size());
  for (int64_t j = 0; j < class_weight.size(); ++j) class_weight.set(j, p.class_weight[(size_t)j]);
  a.class_weight = class_weight.size() ? class_weight.data() : nullptr;
  a.target = p.target.empty() ? nullptr : p.target.data();
  a.target_strides = {p.inner, 1, 0};
  if (t.target == ItemTarget::list) a.target_strides = {p.inner * p.columns, p.columns, 1};
  a.ignore_index = p.ignore_index;
  std::copy(p.parameters, p.parameters + mbk::kRowParameters, a.parameters);
  a.scale = {p.scale, nullptr, DType::f64};
  a.accumulate = v.accumulate;
  Buffer losses(compute, p.items()), result(compute, 1);
  a.losses = losses.data();
  mbk::ExactSumState sum{};
  mbk::Result reduce{};
  reduce.reduction = p.mean ? mbk::Reduction::mean : mbk::Reduction::sum;
  reduce.loss = result.data(), reduce.loss_dtype = compute;
  reduce.loss_sum = compute == DType::f32 ? &sum : nullptr;
  Outcome o;
  if (!v.cut) {
    o.divisor = call(tier, p, v, a, reduce);
  } else {
    reduce.loss = nullptr;
    reduce.has_denominator = true;
    o.divisor = 1;
    if (p.mean) {  // of the whole
      mbk::RowArgs weighed = a;
      weighed.target_is_index = t.target == ItemTarget::index && a.target;
      if (!t.weighs_divisor) weighed.class_weight = nullptr;
      double count = 0;
      for (int64_t i = 0; i < p.items(); ++i)
        count += compute == DType::f64 ? mbk::host::item_weight<double>(weighed, i)
                                       : (double)mbk::host::item_weight<float>(weighed, i);
      o.divisor = count;
    }
    reduce.denominator = {o.divisor, nullptr, DType::f64};
    for (int64_t i = 0; i < p.items(); ++i) {
      mbk::MultirowArgs one = a;
      one.items = 1, one.inner_size = 1;
      const auto at = [&](const mbk::Strides& s) {
        return i / p.inner * s.outer + i % p.inner * s.inner;
      };
      for (int k = 0; k < t.inputs; ++k)
        for (mbk::RowTensor* row : {&one.inputs[k], &one.grads[k]})
          if (row->data) row->data = (char*)row->data + at(row->strides) * size_of(row->dtype);
      const auto move = [&](const void*& data, const mbk::Strides& s, int size) {
        if (data) data = (const char*)data + at(s) * size;
      };
      move(one.sample_weight, one.sample_weight_strides, size_of(compute));
      move(one.item_scale, one.item_scale_strides, size_of(compute));
      move(one.target, one.target_strides, 8);
      if (one.label.data) one.label.data = (float*)one.label.data + at(one.label.strides);
      one.losses = (char*)losses.data() + i * size_of(compute);
      call(tier, p, v, one, reduce);
    }
  }
  for (int64_t i = 0; i < p.items(); ++i) o.losses.push_back(losses.bits(i));
  for (int k = 0; k < t.gradients; ++k) {
    if (!p.wanted[k]) continue;
    const Placed& at = same[k] ? x[k] : grad[k];
    std::vector<bool> inside((size_t)at.memory->size());
    for (int64_t i = 0; i < p.items(); ++i)
      for (int64_t j = 0; j < p.columns; ++j) {
        o.grad[k].push_back(at.memory->bits(at.offset(p, i, j)));
        inside[(size_t)at.offset(p, i, j)] = true;
      }
    for (int64_t n = 0; n < at.memory->size(); ++n)
      CHECK(inside[(size_t)n] || at.memory->bits(n) == at.memory->poison(),
            "%s: the gap at %lld was written", tier.name, (long long)n);
  }
  for (const int64_t limb : sum.limb) o.total.push_back((uint64_t)limb);
  o.total.push_back(v.cut ? 0 : result.bits(0));
  return o;
}

std::string describe(const Problem& p, const mbk::Backend& tier, const Variant& v) {
  char text[240];
  static const char* const names[] = {
      "nll", "multi_margin", "multilabel_margin", "soft", "cosine", "triplet", "dice", "kl",
      "js",  "tv",           "entropy",           "focal"};
  snprintf(text, sizeof text, "%s %s %s (%lld, %lld, %lld)%s%s%s threads %d%s%s", tier.name,
           names[p.loss], name_of(p.type[0]), (long long)p.outer, (long long)p.columns,
           (long long)p.inner, v.plain ? "" : " strided", v.in_place ? " in place" : "",
           v.accumulate ? " accumulate" : "", v.threads, v.device ? " on the device" : "",
           v.cut ? " cut" : "");
  return text;
}

double value_of(uint64_t bits, DType type) {
  Buffer cell(type, 1);
  memcpy(cell.data(), &bits, (size_t)size_of(type));
  return cell.get(0);
}

// Losses, and gradients of some columns by differences: near kinks there is none.
void check_values(Random& r, const Problem& p, const Outcome& o, const std::string& where) {
  const auto& t = traits(p.loss);
  const DType compute = p.compute();
  const bool wide = compute == DType::f64;
  const Real u = wide ? 1e-12L : 4e-6L;  // the sum of a block: 21 roundings; exponentials
  Real weights = 0;
  for (int64_t i = 0; i < p.items(); ++i) {
    const Real sample = p.sample_weight.empty() ? 1 : p.sample_weight[(size_t)i];
    const bool ignored =
        t.target == ItemTarget::index && !p.target.empty() && p.target[(size_t)i] == p.ignore_index;
    if (ignored) {
      CHECK(o.losses[(size_t)i] == 0, "%s: the loss of an ignored item", where.c_str());
      for (int k = 0; k < t.gradients; ++k)
        for (int64_t j = 0; p.wanted[k] && j < p.columns; ++j)
          CHECK(o.grad[k][(size_t)(i * p.columns + j)] == 0, "%s: an ignored gradient",
                where.c_str());
      continue;
    }
    Row x[kRows];
    for (int k = 0; k < t.inputs; ++k)
      x[k].assign(p.x[k].begin() + i * p.columns, p.x[k].begin() + (i + 1) * p.columns);
    bool plain = true;
    for (int k = 0; k < t.inputs; ++k)
      for (const Real v : x[k]) plain = plain && fabsl(v) <= 100;
    const Real item = plain_loss(p, i, x), loss = item * sample;
    weights += sample * (t.weighs_divisor && !p.class_weight.empty()
                             ? p.class_weight[(size_t)p.target[(size_t)i]]
                             : 1);
    if (!plain) continue;  // the same bits everywhere is all that is asked for
    // Subtractions of logits, in fp32, are scaled by as much as 20.
    Real size = fabsl(loss) + (p.loss == kMultiMargin || p.loss == kMultilabelMargin ? 4 : 0);
    if (p.loss == kFocal || p.loss == kTv) size *= 8;
    const Real got = value_of(o.losses[(size_t)i], compute);
    CHECK(fabsl(got - loss) <= u * size + 0x1p-140L, "%s: loss %lld is %.17Lg, not %.17Lg",
          where.c_str(), (long long)i, got, loss);
    const Real factor =
        p.scale * (p.item_scale.empty() ? 1 : p.item_scale[(size_t)i]) / o.divisor * sample;
    for (int k = 0; k < t.gradients; ++k) {
      if (!p.wanted[k]) continue;
      Real largest = 0;
      for (int64_t j = 0; j < p.columns; ++j)
        largest =
            fmaxl(largest, fabsl(value_of(o.grad[k][(size_t)(i * p.columns + j)], p.type[k])));
      for (int n = 0; n < 12; ++n) {
        const bool at_target = n == 0 && t.target == ItemTarget::index && !p.target.empty();
        const int64_t j = at_target ? p.target[(size_t)i] : r.below(p.columns);
        const Real h = 1e-5L, middle = x[k][(size_t)j];
        x[k][(size_t)j] = middle + h;
        const Real up = plain_loss(p, i, x);
        x[k][(size_t)j] = middle - h;
        const Real down = plain_loss(p, i, x);
        x[k][(size_t)j] = middle;
        // Between kinks the margins are straight; one of them bends the loss by 1 / C.
        const bool straight = p.loss == kMultiMargin || p.loss == kMultilabelMargin;
        const Real bend = straight ? 1e-4L / (Real)p.columns : 1e-4L;
        if (fabsl((up - item) - (item - down)) > bend * h) continue;
        const Real want = (up - down) / (2 * h) * factor;
        const Real have = value_of(o.grad[k][(size_t)(i * p.columns + j)], p.type[k]);
        // Differences of numbers as large as 1 are formed in the computed type.
        const Real unit = fabsl(factor) * (p.loss == kTriplet ? 1 : fmaxl(1, p.parameters[2]));
        const Real slack = 1.01L * roundoff(p.type[k]) * fabsl(want) + half_denormal(p.type[k]) +
                           (wide ? 3e-9L : 6e-6L) * (largest + unit * 1e-2L);
        CHECK(fabsl(have - want) <= slack, "%s: gradient %d of (%lld, %lld) is %.12Lg, not %.12Lg",
              where.c_str(), k, (long long)i, (long long)j, have, want);
      }
    }
  }
  if (p.mean && o.divisor != 0)
    CHECK(fabsl(o.divisor - weights) <= (wide ? 0x1p-47L : 0x1p-23L) * weights,
          "%s: divisor %.17g, not %.17Lg", where.c_str(), o.divisor, weights);
}

int64_t check_problem(Random& r, const Problem& p, bool in_digest = true) {
  const auto& tiers = mbk::available_backends();
  Outcome first, first_sum;
  int64_t elements = 0;
  for (size_t t = 0; t < tiers.size(); ++t) {
    std::vector<Variant> variants(6);
    variants[1].plain = false;
    variants[2].plain = false, variants[2].in_place = true;
    variants[3].in_place = true, variants[3].threads = 3;
    variants[4].accumulate = true;
    variants[5].plain = false, variants[5].accumulate = true, variants[5].threads = 3;
#if defined(MBKERN_CUDA)
    const std::vector<Variant> host = variants;
    for (Variant v : host) {
      v.device = true;
      if (t == 0) variants.push_back(v);
    }
#endif
    Variant cut;
    cut.cut = true, cut.plain = false;
    variants.push_back(cut);
    for (const Variant& v : variants) {
      const std::string where = describe(p, *tiers[t], v);
      // fp64 weights are added in another order than that of the kernels by a cut.
      if (v.cut && p.mean && p.compute() == DType::f64) continue;
      const Outcome o = run(r, *tiers[t], p, v);
      if (&v == &variants[0]) {
        if (in_digest) {
          digest_of(t).add(o.losses), digest_of(t).add(o.total);
          for (const auto& words : o.grad) digest_of(t).add(words);
        }
        if (t == 0) check_values(r, p, first = o, where);
      }
      if (v.accumulate && first_sum.total.empty()) first_sum = o;
      const Outcome& want = v.accumulate ? first_sum : first;
      // The exact divisor is the sum of fp32 weights, which a cut adds up in fp64.
      if (v.cut && o.divisor != first.divisor) continue;
      CHECK(o.losses == first.losses, "%s: the losses differ", where.c_str());
      CHECK(v.cut || o.total == first.total, "%s: the total differs", where.c_str());
      CHECK(o.divisor == first.divisor || o.divisor != o.divisor, "%s: divisor %.17g, not %.17g",
            where.c_str(), o.divisor, first.divisor);
      for (int k = 0; k < kRows; ++k) {
        CHECK(o.grad[k] == want.grad[k], "%s: gradient %d differs", where.c_str(), k);
        elements += (int64_t)o.grad[k].size();
        for (size_t n = 0; v.accumulate && p.type[k] == p.compute() && n < o.grad[k].size(); ++n) {
          Buffer both(p.compute(), 1);
          both.set(0, old_value(n) + value_of(first.grad[k][n], p.compute()));
          CHECK(o.grad[k][n] == (both.get(0) != both.get(0) ? nan_bits(p.compute()) : both.bits(0)),
                "%s: gradient %d of %zu is no sum", where.c_str(), k, n);
        }
      }
    }
  }
  return elements;
}

// A class out of range throws, with the values in the message, before anything is written.
int64_t multirow_refusals() {
  constexpr int64_t kItems = 33, kColumns = 10;
  int64_t count = 0;
  for (const mbk::Backend* tier : mbk::available_backends())
    for (const int loss :
         {(int)kNll, (int)kMultiMargin, (int)kMultilabelMargin, (int)kKl, (int)kFocal})
      for (const int64_t bad : {3, 10, -1, -2})
        for (const int64_t at : {int64_t{0}, int64_t{20}, kItems - 1}) {
          const bool list = traits(loss).target == ItemTarget::list;
          std::vector<int64_t> target((size_t)(list ? kItems * kColumns : kItems), 1);
          target[(size_t)(list ? at * kColumns + 2 : at)] = bad;
          Buffer x(DType::f32, kItems * kColumns), grad(DType::f32, x.size());
          Buffer losses(DType::f32, kItems), result(DType::f32, 1);
          for (int64_t k = 0; k < x.size(); ++k) x.set(k, (double)(k % 7));
          mbk::MultirowArgs a{};
          a.items = kItems, a.inner_size = 1, a.columns = kColumns, a.threads = 1;
          for (int k = 0; k < traits(loss).inputs; ++k)
            a.inputs[k] = {x.data(), DType::f32, {kColumns, 0, 1}};
          a.grads[0] = {grad.data(), DType::f32, {kColumns, 0, 1}};
          a.target = target.data();
          a.target_strides = {list ? kColumns : 1, 0, 1}, a.ignore_index = -100;
          a.parameters[0] = a.parameters[1] = 1;
          a.scale = {1, nullptr, DType::f64}, a.losses = losses.data();
          mbk::Result r{};
          r.reduction = mbk::Reduction::mean, r.loss = result.data();
          std::string message;
          try {
            mbk::run_multirow_loss(*tier, loss, DType::f32, a, r);
          } catch (const std::out_of_range& e) {
            message = e.what();
          }
          const bool good = bad == 3 || (list && bad == -1);
          const std::string value = " " + std::to_string(bad) + " ",
                            flat = std::to_string(list ? at * kColumns + 2 : at);
          CHECK(good == message.empty(), "%s: loss %d, target%sthrew '%s'", tier->name, loss,
                value.c_str(), message.c_str());
          CHECK(good || (message.find(value) != std::string::npos &&
                         message.find("index " + flat + " ") != std::string::npos),
                "neither%sat %s in '%s'", value.c_str(), flat.c_str(), message.c_str());
          for (const Buffer* b : {&grad, &losses, &result})
            for (int64_t k = 0; k < b->size(); ++k, ++count)
              CHECK(good == (b->bits(k) != b->poison()), "%s: loss %d, element %lld %s written",
                    tier->name, loss, (long long)k, good ? "was not" : "was");
        }
  return count;
}

}  // namespace

int64_t multirow_losses(const Options& options) {
  Random r{6};
  int64_t elements = multirow_refusals(), seed = 0;
  const auto check = [&](int64_t columns, int rounds) {
    for (int loss = 0; loss < kLosses; ++loss)
      for (int type = 0; type < mbk::kDTypes; ++type)
        for (int round = 0; round < (options.quick ? 1 : rounds); ++round) {
          Random problem{(uint64_t)(1000000 + ++seed)};
          elements += check_problem(r, make_problem(problem, loss, (DType)type, columns));
        }
  };
  for (const int64_t columns : {2, 3, 10, 16, 17, 63, 64, 65, 100, 128, 130, 191})
    check(columns, options.quick ? 1 : 3);
  for (const int64_t columns : {1000, 1023, 1024, 1025, 1100, 2100}) check(columns, 1);
  check(9000, 1);
  // More blocks of columns than CUDA's kernels add up, or keep the exponentials of, at once.
  for (const int loss : {(int)kMultiMargin, (int)kTriplet, (int)kKl, (int)kTv, (int)kFocal}) {
    Random problem{(uint64_t)(2000000 + loss)};
    elements += check_problem(r, make_problem(problem, loss, DType::f32, 33000), false);
  }
  return elements;
}

}  // namespace test
