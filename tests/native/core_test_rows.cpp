// Cross-entropy over every storage type, target kind, option, layout and tier: the same bits
// everywhere, near the reference, and nothing read or written that is not its own.
#include <stdexcept>
#include <string>

#include "row_run.h"

namespace test {
namespace {

void near(const char* what, const std::vector<uint64_t>& got, DType type,
          const std::vector<double>& want, const std::vector<double>& bound,
          const std::string& where) {
  Buffer cell(type, 1);
  for (size_t k = 0; k < got.size(); ++k) {
    memcpy(cell.data(), &got[k], (size_t)size_of(type));
    const double x = cell.get(0), y = want[k];
    const double slack = bound[k] + 2 * half_denormal(type) + roundoff(type) * fabs(y) * 1.01;
    if (y != y ? got[k] == nan_bits(type) : x == y || fabs(x - y) <= slack) continue;
    CHECK(false, "%s: %s %zu is %.9g, not %.9g +- %.3g", where.c_str(), what, k, x, y, slack);
    return;
  }
}

void check_values(const RowProblem& p, const Outcome& o, const std::string& where) {
  if (o.divisor == 0) return;
  const RowReference r = row_reference(p, o.divisor);
  near("loss", o.losses, p.compute(), r.loss, r.loss_bound, where);
  near("gradient", o.grad, p.dtype, r.grad, r.grad_bound, where);
  long double weights = 0, total = 0, size = 0;
  Buffer cell(p.compute(), 1);
  for (int64_t i = 0; i < p.items(); ++i) {
    if (!p.ignored(i))
      weights += p.weight(p.sample_weight, i) *
                 (p.target.empty() ? 1 : p.weight(p.class_weight, p.target[(size_t)i]));
    memcpy(cell.data(), &o.losses[(size_t)i], (size_t)size_of(p.compute()));
    total += cell.get(0), size += fabs(cell.get(0));
  }
  const double u = roundoff(p.compute());
  if (p.mean)
    CHECK(fabsl(o.divisor - weights) <=
              (p.dtype == DType::f64 ? (double)p.items() : 2.0) * u * weights,
          "%s: divisor %.17g, not %.17Lg", where.c_str(), o.divisor, weights);
  // fp32: the rounding of the result only, of an exact total. fp64: of every addition.
  const long double slack = p.dtype == DType::f64 ? size * (long double)p.items() : fabsl(total);
  near("result", {o.total.back()}, p.compute(), {(double)(total / o.divisor)},
       {(double)(u * slack * 1.01L / o.divisor)}, where);
}

// old + g, rounded once, where g is not rounded before; untouched where the item is ignored.
void check_accumulated(const RowProblem& p, const Outcome& o, const Outcome& base,
                       const std::string& where) {
  Buffer old(p.compute(), 1), sum(p.compute(), 1), g(p.compute(), 1);
  for (size_t k = 0; k < o.grad.size(); ++k) {
    old.set(0, old_value(k));
    memcpy(g.data(), &base.grad[k], (size_t)size_of(p.compute()));
    const bool ignored = p.ignored((int64_t)k / p.columns);
    sum.set(0, old.get(0) + (ignored ? 0 : g.get(0)));
    const bool nan = sum.get(0) != sum.get(0);
    const uint64_t want = nan ? nan_bits(p.compute()) : sum.bits(0);
    if (o.grad[k] == want) continue;
    CHECK(false, "%s: gradient %zu is %llx, not %llx", where.c_str(), k,
          (unsigned long long)o.grad[k], (unsigned long long)want);
    return;
  }
}

int64_t check_problem(Random& r, const RowProblem& p) {
  Outcome first, first_sum;
  const auto& tiers = mbk::available_backends();
  const auto layout = [&r](bool flat) {
    return (int)(flat ? r.below(kFlatLayouts) : kFlatLayouts + r.below(kLayouts - kFlatLayouts));
  };
  int64_t elements = 0;
  for (size_t t = 0; t < tiers.size(); ++t) {
    const mbk::Backend& tier = *tiers[t];
    const Outcome base = run(tier, p, {});
    for (const auto* words : {&base.grad, &base.losses, &base.state, &base.total})
      digest_of(t).add(*words);
    if (t == 0) check_values(p, first = base, describe(p, tier, {}));
    Variant v[8];
    for (int k = 0; k < 8; ++k) {
      const bool flat = k == 0 || (k > 1 && r.one_in(2));
      v[k].input_layout = layout(flat), v[k].grad_layout = layout(flat);
    }
    v[2].in_place = true, v[2].grad_layout = v[2].input_layout;
    v[3].direct = true;
    v[4].gradient = false;
    v[5].from_state = true;
    v[6].accumulate = v[7].accumulate = true, v[7].from_state = true;
    std::vector<Variant> variants(v, v + 8);
#if defined(MBKERN_CUDA)
    if (t == 0) {
      for (Variant on_device : {Variant{}, v[0], v[1], v[2], v[4], v[5], v[6], v[7]}) {
        on_device.device = true;
        variants.push_back(on_device);
      }
    }
#endif
    for (const Variant& variant : variants) {
      const Outcome o = run(tier, p, variant, &base);
      const std::string where = describe(p, tier, variant);
      elements += (int64_t)o.grad.size();
      if (!variant.from_state) {
        compare("loss", o.losses, first.losses, where);
        compare("state", o.state, first.state, where);
        compare("total", o.total, first.total, where);
      }
      if (variant.accumulate) {
        if (first_sum.grad.empty()) first_sum = o;
        compare("sum", o.grad, first_sum.grad, where);
        if (p.dtype == p.compute()) check_accumulated(p, o, first, where);
      } else if (variant.gradient) {
        compare("gradient", o.grad, first.grad, where);
      }
    }
    compare("gradient", base.grad, first.grad, describe(p, tier, {}));
  }
  return elements;
}

}  // namespace

int64_t row_losses(const Options& options) {
  Random r{3};
  int64_t elements = 0, seed = 0;
  const auto check = [&](int64_t columns) {
    for (int type = 0; type < mbk::kDTypes; ++type)
      for (int round = 0; round < (options.quick || columns > 130 ? 1 : 3); ++round) {
        Random problem{(uint64_t)++seed};
        elements += check_problem(r, make_row_problem(problem, (DType)type, columns));
      }
  };
  for (int64_t columns = 1; columns <= 130; columns += options.quick ? 9 : 1) check(columns);
  for (const int64_t columns : {256, 511, 512, 513}) check(columns);
  for (int64_t columns = 1000; columns <= 1100; columns += options.quick ? 24 : 1) check(columns);
  check(5000);
  return elements;
}

int64_t row_threads(const Options& options) {
  const int64_t shapes[][3] = {{300, 1, 1000}, {12000, 1, 10}, {3, 1500, 21}, {60, 1, 5000}};
  Random r{4};
  int64_t elements = 0;
  for (const auto& shape : shapes)
    for (int type = 0; type < mbk::kDTypes; ++type) {
      RowProblem p = make_row_problem(r, (DType)type, shape[2]);
      const size_t base_items = (size_t)p.items();
      p.outer = options.quick ? (shape[0] + 3) / 4 : shape[0], p.inner = shape[1];
      const auto repeat = [&p, base_items](auto& v, size_t per_item) {
        if (v.empty()) return;
        auto more = v;
        more.clear();
        for (size_t k = 0; k < (size_t)p.items() * per_item; ++k)
          more.push_back(v[k % (base_items * per_item)]);
        v = more;
      };
      repeat(p.x, (size_t)p.columns), repeat(p.probabilities, (size_t)p.columns);
      repeat(p.target, 1), repeat(p.sample_weight, 1), repeat(p.item_scale, 1);
      const auto& tiers = mbk::available_backends();
      const Outcome one = run(*tiers[0], p, {});
      for (const mbk::Backend* tier : tiers)
        for (const int threads : {2, 3, 7, 64}) {
          Variant v;
          v.threads = threads;
          v.input_layout = v.grad_layout = shape[1] > 1 ? 3 : 0;
          const Outcome o = run(*tier, p, v);
          const std::string where = describe(p, *tier, v);
          compare("gradient", o.grad, one.grad, where),
              compare("loss", o.losses, one.losses, where);
          compare("total", o.total, one.total, where), compare("state", o.state, one.state, where);
          elements += (int64_t)o.grad.size();
        }
    }
  return elements;
}

// Rows that take several teams, blocks and clusters of the CUDA kernels, or several waves.
int64_t row_devices(const Options& options) {
  int64_t elements = 0;
#if defined(MBKERN_CUDA)
  uint64_t seed = 1000;
  const mbk::Backend& tier = *mbk::available_backends()[0];
  for (const int64_t columns : {1023, 1024, 1032, 2048, 3080, 8192, 9000, 16384, 16392, 33000,
                                40001, 70000, 140000, 262144, 300000, 600001})
    for (int type = 0; type < mbk::kDTypes; ++type)
      for (int round = 0; round < (options.quick || columns > 40000 ? 1 : 4); ++round) {
        Random r{++seed};
        const RowProblem p = make_row_problem(r, (DType)type, columns);
        const Outcome base = run(tier, p, {});
        Variant v;
        v.accumulate = true;
        const Outcome sum = run(tier, p, v);
        for (int kind = 0; kind < 5; ++kind) {
          Variant on_device;
          on_device.device = true;
          on_device.input_layout = on_device.grad_layout = kind == 1 ? 1 : kind == 2 ? 3 : 0;
          on_device.in_place = kind == 0;
          on_device.accumulate = kind == 3;
          on_device.from_state = kind == 4;
          const Outcome o = run(tier, p, on_device, &base);
          const std::string where = describe(p, tier, on_device);
          elements += (int64_t)o.grad.size();
          compare("gradient", o.grad, kind == 3 ? sum.grad : base.grad, where);
          if (kind == 4) continue;
          compare("loss", o.losses, base.losses, where);
          compare("state", o.state, base.state, where);
          compare("total", o.total, base.total, where);
        }
      }
#endif
  (void)options;
  return elements;
}

// A class index out of range throws, with the values in the message, before anything is written.
int64_t row_refusals(const Options&) {
  constexpr struct {
    mbk::IndexType type;
    int size;
    int64_t bad[2];
  } kTypes[] = {{mbk::IndexType::i64, 8, {INT64_MIN, INT64_MAX}},
                {mbk::IndexType::i32, 4, {INT32_MIN, INT32_MAX}},
                {mbk::IndexType::i16, 2, {-1, 32767}},
                {mbk::IndexType::i8, 1, {-128, 10}},
                {mbk::IndexType::u8, 1, {255, 10}}};
  constexpr int64_t kItems = 33, kColumns = 10;
  int64_t count = 0;
  for (const mbk::Backend* tier : mbk::available_backends())
    for (const auto& type : kTypes)
      for (const int64_t bad : {int64_t{3}, type.bad[0], type.bad[1]})
        for (const int64_t at : {int64_t{0}, int64_t{20}, kItems - 1}) {
          const std::unique_ptr<char[]> target(new char[(size_t)(kItems * type.size)]);
          for (int64_t i = 0; i < kItems; ++i) {  // the machine is little-endian
            const int64_t value = i == at ? bad : i % kColumns;
            memcpy(target.get() + i * type.size, &value, (size_t)type.size);
          }
          Buffer x(DType::f32, kItems * kColumns), grad(DType::f32, x.size());
          Buffer losses(DType::f32, kItems), state(DType::f32, 2 * kItems), result(DType::f32, 1);
          for (int64_t k = 0; k < x.size(); ++k) x.set(k, (double)(k % 7));
          mbk::ExactSumState sum{};
          mbk::RowArgs a{};
          a.items = kItems, a.inner_size = 1, a.columns = kColumns, a.threads = 1;
          a.input = x.data(), a.grad = grad.data();
          a.input_strides = a.grad_strides = {kColumns, 0, 1};
          a.target = target.get(), a.target_is_index = true, a.target_type = type.type;
          a.target_strides = {1, 0, 0}, a.ignore_index = -100;
          a.scale = {1, nullptr, DType::f64};
          a.losses = losses.data(), a.row_state = state.data();
          mbk::Result r{};
          r.reduction = mbk::Reduction::mean, r.loss = result.data(), r.loss_sum = &sum;
          std::string message;
          try {
            mbk::run_row_loss(*tier, 0, DType::f32, a, r);
          } catch (const std::out_of_range& e) {
            message = e.what();
          }
          const bool good = bad == 3;
          const std::string value = " " + std::to_string(bad) + " ", flat = std::to_string(at);
          CHECK(good == message.empty(), "%s: target %s threw '%s'", tier->name, value.c_str(),
                message.c_str());
          CHECK(good || (message.find(value) != std::string::npos &&
                         message.find("index " + flat + " ") != std::string::npos),
                "neither%sat %s in '%s'", value.c_str(), flat.c_str(), message.c_str());
          for (const Buffer* b : {&grad, &losses, &state, &result})
            for (int64_t k = 0; k < b->size(); ++k, ++count)
              CHECK(good == (b->bits(k) != b->poison()), "%s: element %lld %s written", tier->name,
                    (long long)k, good ? "was not" : "was");
          const mbk::ExactSumState none{};
          CHECK(good || !memcmp(&sum, &none, sizeof sum), "loss_sum was written");
        }
  return count;
}

}  // namespace test
