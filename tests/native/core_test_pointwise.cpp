// Element-wise losses over storage types, broadcasting, layouts, options and tiers: the same bits
// everywhere, near a plain loop in long double, and nothing read or written that is not its own.
#include <math.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/pointwise_call.h"
#include "cuda/calls.h"
#include "losses/all.h"

namespace test {
namespace {

using mbk::DType;

constexpr int kDims = 3;
constexpr int kInputs = mbk::kLosses;  // the first of the views are read
constexpr int kLossCount = mbk::host::PointwiseLosses::size;
constexpr int kSquaredErrors = 2;  // the first two, whose values are checked here

struct Problem {
  int loss;
  DType compute, type[mbk::kViews];
  bool present[mbk::kViews];
  int64_t shape[kDims];
  bool broadcast[kInputs][kDims];
  std::vector<double> values[kInputs];  // over the whole shape, equal where broadcast
  double parameters[mbk::kParameters];
  double scale;
  bool mean;
  int64_t size() const { return shape[0] * shape[1] * shape[2]; }
};

void fill(Random& r, Problem& p, bool broadcasts) {
  const int64_t size = p.size();
  const double spread = r.one_in(2) ? 1 : 30;
  for (int v = 0; v < kInputs; ++v) {
    for (bool& b : p.broadcast[v]) b = broadcasts && v != mbk::kInput && r.one_in(5);
    p.values[v].resize((size_t)size);
    Buffer cell(p.type[v], 1);
    for (int64_t i = 0; i < size; ++i) {
      int64_t source = 0, index[kDims] = {i / p.shape[2] / p.shape[1], i / p.shape[2] % p.shape[1],
                                          i % p.shape[2]};
      for (int d = 0; d < kDims; ++d)
        source = source * p.shape[d] + (p.broadcast[v][d] ? 0 : index[d]);
      const bool weight = v == mbk::kWeight || v == mbk::kRescale;
      double x = weight ? 2 * r.uniform() : spread * r.symmetric();
      if (!weight && r.one_in(500)) {
        constexpr double kSpecial[] = {NAN, INFINITY, -INFINITY, 0x1p-149, -0.0, 65504, 0x1p-24};
        x = kSpecial[r.below(sizeof kSpecial / sizeof *kSpecial)];
      }
      cell.set(0, x);
      p.values[v][(size_t)i] = source == i ? cell.get(0) : p.values[v][(size_t)source];
    }
  }
}

Problem make_problem(Random& r, int64_t size) {
  Problem p{};
  p.loss = (int)r.below(r.one_in(2) ? kSquaredErrors : kLossCount);
  constexpr double kChoices[] = {0.7, 1, 0, 2};
  for (double& x : p.parameters) x = kChoices[r.below(4)];
  p.compute = r.one_in(3) ? DType::f64 : DType::f32;
  for (int v = 0; v < mbk::kViews; ++v) {
    const bool wide = v == mbk::kWeight || v == mbk::kRescale ||
                      v == mbk::kLosses;  // always in the computed type
    p.type[v] = wide || r.one_in(2) ? p.compute : (DType)r.below(3);
    p.present[v] = v < 2 || r.one_in(2);
    const bool third = v == 2 || v == mbk::kGrad + 2;
    if (third && inputs_of(mbk::host::PointwiseLosses{}, p.loss) < 3) p.present[v] = false;
  }
  p.shape[0] = p.shape[1] = 1, p.shape[2] = size;
  for (int d = 0; d < 2; ++d)
    for (const int64_t factor : {7, 3, 2})
      if (p.shape[2] % factor == 0 && r.one_in(2)) p.shape[2] /= factor, p.shape[d] *= factor;
  p.scale = r.one_in(2) ? 1 : 3 * r.symmetric();
  p.mean = r.one_in(2);
  fill(r, p, true);
  return p;
}
// As nearly all calls are: dense tensors of one type, no weights, the losses in sum only. Gradients
// are of that type, too, or wide, as buffers are.
Problem make_usual_problem(Random& r, int loss, DType type, bool wide, int64_t size) {
  Problem p{};
  p.loss = loss;
  constexpr double kChoices[] = {0.7, 1, 0, 2};
  for (double& x : p.parameters) x = kChoices[r.below(4)];
  p.compute = DType::f32;
  const int inputs = inputs_of(mbk::host::PointwiseLosses{}, loss);
  for (int v = 0; v < mbk::kViews; ++v) {
    const int gradient = v - mbk::kGrad;
    p.type[v] = v == mbk::kLosses || (wide && gradient >= 0) ? p.compute : type;
    p.present[v] =
        v < inputs || gradient == 0 || (gradient > 0 && gradient < inputs && r.one_in(2));
  }
  p.shape[0] = p.shape[1] = 1, p.shape[2] = size;
  p.scale = 1;
  p.mean = r.one_in(2);
  fill(r, p, false);
  return p;
}

// Memory for one view: dimensions in the order `order`, the innermost with the stride `step`.
struct Placed {
  mbk::View view{};
  std::vector<int64_t> offset;  // of each element
  std::unique_ptr<Buffer> memory;
};
Placed place(const Problem& p, int v, const int (&order)[kDims], int64_t step) {
  Placed placed;
  int64_t stride = step, last = 0;
  for (int k = kDims - 1; k >= 0; --k) {
    const int d = order[k];
    const bool repeated = v < kInputs && p.broadcast[v][d];
    placed.view.strides[d] = repeated ? 0 : stride;
    last += repeated ? 0 : (p.shape[d] - 1) * stride;
    stride *= repeated ? 1 : p.shape[d];
  }
  placed.memory.reset(new Buffer(p.type[v], last + 1));
  placed.view.data = placed.memory->data(), placed.view.dtype = p.type[v];
  const int64_t* s = placed.view.strides;
  for (int64_t i = 0; i < p.size(); ++i) {
    placed.offset.push_back(i / p.shape[2] / p.shape[1] * s[0] +
                            i / p.shape[2] % p.shape[1] * s[1] + i % p.shape[2] * s[2]);
    if (v < kInputs) placed.memory->set(placed.offset.back(), p.values[v][(size_t)i]);
  }
  return placed;
}

struct Variant {
  bool plain = true;  // every view contiguous
  bool in_place = false, accumulate = false;
  int threads = 1;
  bool device = false;  // CUDA's kernels, whatever the tier
};
struct Outcome {
  std::vector<uint64_t> view[mbk::kViews], total;
  double divisor;
};

double old_value(size_t i) { return (double)((i * 37) % 101) * 0.03125 - 1.5; }

Outcome run(Random& r, const mbk::Backend& tier, const Problem& p, const Variant& variant) {
  Placed placed[mbk::kViews];
  mbk::PointwiseArgs a{};
  a.dims = kDims, a.threads = variant.threads, a.accumulate = variant.accumulate;
  std::copy(p.shape, p.shape + kDims, a.shape);
  a.scale = {p.scale, nullptr, DType::f64};
  std::copy(std::begin(p.parameters), std::end(p.parameters), a.parameters);
  const bool same = variant.in_place && p.type[mbk::kGrad] == p.type[mbk::kInput];
  for (int v = 0; v < mbk::kViews; ++v) {
    if (!p.present[v]) continue;
    int order[kDims] = {0, 1, 2};
    if (!variant.plain)
      for (int k = 0; k < kDims; ++k) std::swap(order[k], order[r.below(kDims)]);
    placed[v] = place(p, v, order, variant.plain ? 1 : 1 + r.below(3));
    a.views[v] = placed[v].view;
    if (v == mbk::kGrad && same) a.views[v] = a.views[mbk::kInput];
    for (int64_t i = 0; v > mbk::kLosses && variant.accumulate && i < p.size(); ++i)
      placed[v].memory->set(placed[v].offset[(size_t)i], old_value((size_t)i));
  }
  Buffer result(p.compute, 1);
  mbk::ExactSumState sum{};
  mbk::Result reduce{};
  reduce.reduction = p.mean ? mbk::Reduction::mean : mbk::Reduction::sum;
  reduce.loss = result.data(), reduce.loss_dtype = p.compute;
  reduce.loss_sum = p.compute == DType::f32 ? &sum : nullptr;
  Outcome o;
  if (variant.device) {
    const int64_t bytes = mbk::cuda::workspace_bytes(p.size(), p.compute == DType::f64);
    const Buffer workspace(DType::f64, (bytes + 7) / 8);
    mbk::cuda::run_pointwise_loss({nullptr, workspace.data()}, p.loss, p.compute, a, reduce);
    o.divisor = workspace.get(0);
  } else {
    o.divisor = mbk::run_pointwise_loss(tier, p.loss, p.compute, a, reduce);
  }
  for (int v = kInputs; v < mbk::kViews; ++v) {
    if (!p.present[v]) continue;
    const Placed& at = placed[v == mbk::kGrad && same ? (int)mbk::kInput : v];
    std::vector<bool> inside((size_t)at.memory->size());
    for (const int64_t k : at.offset) {
      o.view[v].push_back(at.memory->bits(k));
      inside[(size_t)k] = true;
    }
    for (int64_t k = 0; k < at.memory->size(); ++k)
      CHECK(inside[(size_t)k] || at.memory->bits(k) == at.memory->poison(),
            "%s: the gap at %lld was written", tier.name, (long long)k);
  }
  for (const int64_t limb : sum.limb) o.total.push_back((uint64_t)limb);
  o.total.push_back(result.bits(0));
  return o;
}

std::string describe(const Problem& p, const mbk::Backend& tier, const Variant& v) {
  std::string text = std::string(tier.name) + " loss " + std::to_string(p.loss) + " in " +
                     name_of(p.compute) + " (";
  for (const int64_t n : p.shape) text += std::to_string(n) + ", ";
  text += ") views";
  for (int k = 0; k < mbk::kViews; ++k)
    text += p.present[k] ? std::string(" ") + name_of(p.type[k]) : " -";
  return text + (v.plain ? "" : " laid out") + (v.in_place ? " in place" : "") +
         (v.accumulate ? " accumulate" : "") + (v.device ? " on the device" : "") + " threads " +
         std::to_string(v.threads);
}

// Bounds: the difference, its square and each factor are rounded once; then the result, to its
// type. A factor that is too small for the type that is computed in loses half its last place, and
// what it is multiplied with afterwards enlarges that.
void check_values(const Problem& p, const Outcome& o, const std::string& where) {
  typedef long double Real;
  const Real u = roundoff(p.compute);
  Real weights = 0, total = 0, size = 0;
  Buffer cell(p.compute, 1);
  for (int64_t i = 0; i < p.size(); ++i) {
    const auto value = [&](int v) { return p.present[v] ? (Real)p.values[v][(size_t)i] : (Real)1; };
    const Real d = value(mbk::kInput) - value(1), w = value(mbk::kWeight),
               rescale = value(mbk::kRescale);
    const Real factor =
        p.scale / o.divisor * value(mbk::kItemScale) * w * rescale * (p.loss ? 2 : 1);
    const Real enlarged = (1 + fabsl(value(mbk::kItemScale))) * (1 + fabsl(w)) *
                          (1 + fabsl(rescale)) * (1 + 2 * fabsl(d));
    const Real want[] = {d * d * (p.loss ? 1 : 0.5L) * w * rescale, d * factor, -d * factor};
    for (int v = mbk::kLosses; v < mbk::kGrad + 2; ++v) {
      if (!p.present[v]) continue;
      Buffer got(p.type[v], 1);
      memcpy(got.data(), &o.view[v][(size_t)i], (size_t)size_of(p.type[v]));
      const Real y = want[v - mbk::kLosses], x = got.get(0);
      Buffer nearest(p.type[v], 1);
      nearest.set(0, (double)y);
      const Real slack =
          (8 * u + 1.01L * roundoff(p.type[v])) * fabsl(y) +
          8 * half_denormal(p.compute) * (v == mbk::kLosses ? 1 + fabsl(rescale) : enlarged) +
          half_denormal(p.type[v]);
      CHECK(y != y ? o.view[v][(size_t)i] == nan_bits(p.type[v])
                   : x == y || fabsl(x - y) <= slack || x == nearest.get(0),
            "%s: view %d element %lld is %.9Lg, not %.9Lg", where.c_str(), v, (long long)i, x, y);
    }
    weights += w;
    if (p.present[mbk::kLosses]) {
      memcpy(cell.data(), &o.view[mbk::kLosses][(size_t)i], (size_t)size_of(p.compute));
      total += cell.get(0), size += fabs(cell.get(0));
    }
  }
  const Real additions = p.compute == DType::f64 ? (Real)p.size() : 2;
  if (p.mean)
    CHECK(fabsl(o.divisor - weights) <= additions * 0x1p-53L * weights,
          "%s: divisor %.17g, not %.17Lg", where.c_str(), o.divisor, weights);
  if (!p.present[mbk::kLosses] || o.divisor == 0) return;
  memcpy(cell.data(), &o.total.back(), (size_t)size_of(p.compute));
  const Real got = cell.get(0), want = total / o.divisor;
  const Real slack = (p.compute == DType::f64 ? size * p.size() : size) * u * 1.01L / o.divisor;
  CHECK(want != want ? got != got : got == want || fabsl(got - want) <= slack + 0x1p-149L,
        "%s: result %.17Lg, not %.17Lg", where.c_str(), got, want);
}

// old + g, rounded once, where the gradient is kept in the type that is computed in.
void check_accumulated(const Problem& p, int v, const Outcome& o, const Outcome& base,
                       const std::string& where) {
  Buffer g(p.compute, 1), sum(p.compute, 1);
  for (size_t i = 0; i < o.view[v].size(); ++i) {
    memcpy(g.data(), &base.view[v][i], (size_t)size_of(p.compute));
    sum.set(0, old_value(i) + g.get(0));
    const uint64_t want = sum.get(0) != sum.get(0) ? nan_bits(p.compute) : sum.bits(0);
    CHECK(o.view[v][i] == want, "%s: view %d element %zu is %llx, not %llx", where.c_str(), v, i,
          (unsigned long long)o.view[v][i], (unsigned long long)want);
  }
}

int64_t check_problem(Random& r, const Problem& p, bool digested = true) {
  const auto& tiers = mbk::available_backends();
  Outcome first, first_sum;
  int64_t elements = 0;
  for (size_t t = 0; t < tiers.size(); ++t) {
    constexpr Variant kVariants[] = {{true, false, false, 1}, {false, false, false, 1},
                                     {false, true, false, 1}, {true, true, false, 3},
                                     {true, false, true, 1},  {false, false, true, 3}};
    std::vector<Variant> variants(std::begin(kVariants), std::end(kVariants));
#if defined(MBKERN_CUDA)
    for (Variant v : kVariants) {
      v.device = true;
      if (t == 0) variants.push_back(v);
    }
#endif
    for (const Variant& v : variants) {
      const std::string where = describe(p, *tiers[t], v);
      const Outcome o = run(r, *tiers[t], p, v);
      const bool base = &v == &variants[0];
      if (base && digested) {
        for (const auto& words : o.view) digest_of(t).add(words);
        digest_of(t).add(o.total);
      }
      if (base && t == 0) {
        first = o;
        if (p.loss < kSquaredErrors) check_values(p, o, where);
      }
      Outcome& want = v.accumulate ? first_sum : first;
      if (v.accumulate && first_sum.total.empty()) first_sum = o;
      // Sums in fp64 are taken in the order of the input's memory: the divisor of a weighted mean
      // may differ in its last places, and with it the gradients; the total may in any case.
      const bool same_order = p.compute == DType::f32 || v.plain;
      const bool same_divisor = same_order || !p.mean || !p.present[mbk::kWeight];
      for (int k = kInputs; k < mbk::kViews && same_divisor; ++k) {
        CHECK(o.view[k] == want.view[k], "%s: view %d differs", where.c_str(), k);
        if (v.accumulate && k != mbk::kLosses && p.type[k] == p.compute && p.present[k])
          check_accumulated(p, k, o, first, where);
        elements += (int64_t)o.view[k].size();
      }
      if (same_order) CHECK(o.total == first.total, "%s: the total differs", where.c_str());
    }
  }
  return elements;
}

}  // namespace

int64_t pointwise_losses(const Options& options) {
  Random r{5};
  int64_t elements = 0, seed = 0;
  const auto check = [&](int64_t size, int rounds) {
    for (int round = 0; round < (options.quick ? 1 : rounds); ++round) {
      Random problem{(uint64_t)++seed};
      elements += check_problem(r, make_problem(problem, size));
    }
  };
  for (int64_t size = 1; size <= 130; size += options.quick ? 7 : 1) check(size, 8);
  for (int64_t size = 1000; size <= 1100; size += options.quick ? 20 : 1) check(size, 4);
  for (const int64_t size : {504, 512, 5000, 5040, 16384, 40000, 42336}) check(size, 6);
  return elements;
}

int64_t usual_pointwise_losses(const Options& options) {
  Random r{6};
  int64_t elements = 0, seed = 0;
  for (int loss = 0; loss < kLossCount; ++loss)
    for (const DType type : {DType::f32, DType::bf16, DType::f16})
      for (const int64_t size : {1, 3, 4, 8, 13, 1023, 1024, 1029, 2048, 2056, 5003, 70000}) {
        if (size > 50000 && (options.quick || loss >= kSquaredErrors)) continue;
        Random problem{(uint64_t)++seed};
        const bool wide = seed % 3 == 0;
        elements += check_problem(r, make_usual_problem(problem, loss, type, wide, size), false);
      }
  return elements;
}

}  // namespace test
