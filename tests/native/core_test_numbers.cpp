// Storage types, the emulated fma and the exact sums, against arithmetic that shares nothing with
// them.
#include <math.h>

#include "check.h"
#include "core/environment.h"
#include "core/exact_bins.h"
#include "core/exact_sum.h"
#include "cpu/dispatch.h"
#include "cpu/pointwise_call.h"

namespace test {
namespace {

namespace m = mbk::MBK_ISA;
using mbk::DType;
using mbk::ExactSumState;

float float_of(uint32_t u) { return m::as_float((int32_t)u); }

// ---- fma
// ------------------------------------------------------------------------------------------

#if defined(__x86_64__)
__attribute__((target("fma"))) float hardware_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
float exact_fma(float a, float b, float c) {
  static const bool have = __builtin_cpu_supports("fma");
  return have ? hardware_fma(a, b, c) : fmaf(a, b, c);
}
#else
float exact_fma(float a, float b, float c) { return fmaf(a, b, c); }
#endif

void check_fma(float a, float b, float c) {
  const float got = m::fma(a, b, c), want = exact_fma(a, b, c);
  CHECK(m::bits(got) == m::bits(want) || (got != got && want != want),
        "fma(%a, %a, %a) is %a, not %a", a, b, c, got, want);
}

// ---- storage types
// --------------------------------------------------------------------------------

struct Format {
  int digits, min_exponent, max_exponent;
};
constexpr Format kFormats[] = {{24, -126, 127}, {8, -126, 127}, {11, -14, 15}, {53, -1022, 1023}};

// Rounded to nearest even, step by step.
double rounded(double x, const Format& f) {
  if (x == 0 || !isfinite(x)) return x;
  const int e = ilogb(x) < f.min_exponent ? f.min_exponent : ilogb(x), last = e - (f.digits - 1);
  const double y = ldexp(nearbyint(ldexp(x, -last)), last);
  return fabs(y) >= ldexp(1, f.max_exponent) * 2 ? copysign(INFINITY, x) : y;
}
double value_of(uint32_t u, DType type) {  // of a 16-bit pattern
  const Format& f = kFormats[(int)type];
  const int fraction = f.digits - 1, biased = (int)(u & 0x7fff) >> fraction;
  const uint32_t low = u & ((1u << fraction) - 1);
  double x = ldexp(low + (biased ? 1 << fraction : 0),
                   f.min_exponent - fraction + (biased ? biased - 1 : 0));
  if (biased == 2 * f.max_exponent + 1) x = low ? NAN : INFINITY;
  return u & 0x8000 ? -x : x;
}
#if defined(__x86_64__)
__attribute__((target("f16c"))) uint32_t hardware_half(float x) {
  return (uint32_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0);
}
#endif

// to = from - 0, through half the squared error's gradient: a load, a subtraction and a store.
void copy_through(const mbk::Backend& tier, const Buffer& from, const Buffer& to) {
  Buffer zero(DType::f32, 1);
  zero.set(0, 0);
  mbk::PointwiseArgs a{};
  a.dims = 1, a.shape[0] = from.size(), a.threads = 1;
  a.views[mbk::kInput] = {from.data(), from.type(), {1}};
  a.views[mbk::kInput + 1] = {zero.data(), DType::f32, {0}};
  a.views[mbk::kGrad] = {to.data(), to.type(), {1}};
  a.scale = {1, nullptr, DType::f64};
  mbk::run_pointwise_loss(tier, 0, DType::f32, a, mbk::Result{});
}

template <class S>
int64_t check_storage(DType type) {
  constexpr uint32_t kLow[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x2000, 0x2fff,
                               0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff};
  constexpr int64_t kPatterns = 65536, kLows = sizeof kLow / sizeof *kLow;
  Buffer narrow(type, kPatterns), wide(DType::f32, kPatterns);
  Buffer from(DType::f32, kPatterns * kLows), to(type, kPatterns * kLows);
  for (int64_t u = 0; u < kPatterns; ++u) {
    const S s{(uint16_t)u};
    memcpy((char*)narrow.data() + 2 * u, &s, 2);
    const float x = m::widen(s);
    const double want = value_of((uint32_t)u, type);
    CHECK(x != x ? want != want : x == want && signbit(x) == signbit(want),
          "%s %04x widens to %a, not %a", name_of(type), (unsigned)u, x, want);
    const uint32_t back = m::narrow<S>(m::canonical(x)).bits;
    CHECK(back == (x != x ? nan_bits(type) : (uint64_t)u), "%s %04x comes back as %04x",
          name_of(type), (unsigned)u, back);
    for (int64_t k = 0; k < kLows; ++k) {
      const float y = float_of((uint32_t)u << 16 | kLow[k]);
      ((float*)from.data())[u * kLows + k] = y;
      const uint32_t h = m::narrow<S>(m::canonical(y)).bits;
      const double nearest = rounded(y, kFormats[(int)type]), got = value_of(h, type);
      CHECK(y != y ? h == nan_bits(type) : got == nearest && signbit(got) == signbit(y),
            "%a becomes %04x in %s, not %a", y, h, name_of(type), nearest);
#if defined(__x86_64__)
      static const bool f16c = __builtin_cpu_supports("avx2");  // no AVX2 without F16C
      if (f16c && type == DType::f16 && y == y)
        CHECK(h == hardware_half(y), "%a becomes %04x, but %04x in F16C", y, h, hardware_half(y));
#endif
    }
  }
  const auto& tiers = mbk::available_backends();
  for (const mbk::Backend* tier : tiers) {
    copy_through(*tier, narrow, wide);
    copy_through(*tier, from, to);
    for (int64_t u = 0; u < kPatterns; ++u) {
      const float x = m::canonical(m::widen(S{(uint16_t)u}));
      CHECK(wide.bits(u) == m::bits(x), "%s %04x widens to %08llx with %s", name_of(type),
            (unsigned)u, (unsigned long long)wide.bits(u), tier->name);
    }
    for (int64_t k = 0; k < from.size(); ++k) {
      const float x = ((const float*)from.data())[k];
      CHECK(to.bits(k) == m::narrow<S>(m::canonical(x)).bits, "%a becomes %04llx in %s with %s", x,
            (unsigned long long)to.bits(k), name_of(type), tier->name);
    }
  }
  return kPatterns * (kLows + 1) * (int64_t)(tiers.size() + 1);
}

// ---- exact sums
// -----------------------------------------------------------------------------------

// A sum of fp32 numbers in units of 2^-149, in two's complement; bit by bit where it matters.
struct Wide {
  static constexpr int kWords = 6;
  uint64_t word[kWords] = {};
  void add(float x) {
    const uint32_t u = m::bits(x), field = (u >> 23) & 0xff;
    const uint64_t mantissa = (u & 0x7fffff) | (field ? 0x800000 : 0);
    const int shift = field ? (int)field - 1 : 0;
    uint64_t term[kWords] = {};
    term[shift / 64] = mantissa << (shift % 64);
    if (shift % 64 > 40) term[shift / 64 + 1] = mantissa >> (64 - shift % 64);
    if (u >> 31) negate(term);
    uint64_t carry = 0;
    for (int i = 0; i < kWords; ++i) {
      const uint64_t with_carry = word[i] + carry;
      carry = with_carry < carry;
      word[i] = with_carry + term[i];
      carry += word[i] < with_carry;
    }
  }
  static void negate(uint64_t (&w)[kWords]) {
    bool carry = true;
    for (uint64_t& x : w) x = ~x + carry, carry = carry && x == 0;
  }
  double value(const Format& f) const {
    Wide a = *this;
    const bool negative = a.word[kWords - 1] >> 63;
    if (negative) negate(a.word);
    const auto bit = [&a](int i) { return i < 0 ? 0 : a.word[i / 64] >> (i % 64) & 1; };
    int top = 64 * kWords - 1;
    while (top >= 0 && !bit(top)) --top;
    int last = top - f.digits + 1;
    if (last < f.min_exponent - f.digits + 1 + 149) last = f.min_exponent - f.digits + 1 + 149;
    double kept = 0;
    for (int i = top; i >= last && i >= 0; --i) kept = 2 * kept + (double)bit(i);
    if (last < 0) last = 0;
    bool below = false;
    for (int i = 0; i < last - 1; ++i) below = below || bit(i);
    if (bit(last - 1) && (below || fmod(kept, 2) != 0)) kept += 1;
    const double x = ldexp(kept, last - 149);
    return (negative ? -1 : 1) * (x >= ldexp(1, f.max_exponent) * 2 ? INFINITY : x);
  }
};

// One draw a statement: the order of draws in an expression would be the compiler's.
float term_of_kind(Random& r, int kind) {
  const bool first = r.one_in(2);
  const int64_t second = r.below(3);
  switch (kind) {
    case 0:
      return (float)(20 * r.uniform());
    case 1: {  // any finite number
      const float x = r.any_float();
      return isfinite(x) ? x : 0;
    }
    case 2:
      return (first ? -1 : 1) * (second ? 1e38f : 1e-38f);
    case 3:
      return float_of((uint32_t)r.below(1 << 24) | (first ? 0x80000000u : 0));
    case 4:  // around the limits of what the bins of exact_bins.h hold
      return (float)ldexp(1 + r.below(3) * 0x1p-23, (first ? 19 : -37) + (int)second);
    default: {  // around the limits of its sum_near: whole numbers, half of a unit, a bit more
      const int fourth = (int)r.below(4);
      if (second == 0) return (float)(1024 + r.below(1100));
      if (second == 1) return (float)ldexp(1, -10 - fourth);
      const float x = (float)ldexp(1 + (first ? 0x1p-23 : 0), -15 - fourth);
      return r.one_in(2) ? -x : x;
    }
  }
}

void check_rounding(const ExactSumState& state, const Wide& exact) {
  for (int type = 0; type < mbk::kDTypes; ++type) {
    Buffer loss((DType)type, 1);
    mbk::Result r{};
    r.reduction = mbk::Reduction::sum, r.loss = loss.data(), r.loss_dtype = (DType)type;
    mbk::store_result(r, state, 1);
    const double want = exact.value(kFormats[type]);
    CHECK(loss.get(0) == want, "the sum in %s is %a, not %a", name_of((DType)type), loss.get(0),
          want);
  }
  CHECK(mbk::exact_value(state) == exact.value(kFormats[3]), "%a", mbk::exact_value(state));
}

// backend.sum, the vectorised way, of terms that lie `stride` apart.
ExactSumState sum_of(const mbk::Backend& tier, const std::vector<float>& terms, int64_t stride) {
  const int64_t n = (int64_t)terms.size();
  Buffer memory(DType::f32, (n - 1) * stride + 1);
  for (int64_t i = 0; i < n; ++i) memcpy((float*)memory.data() + i * stride, &terms[i], 4);
  mbk::ThreadTotals totals(2);
  mbk::PointwiseArgs a{};
  a.size = a.shape[0] = n, a.dims = 1, a.threads = 2, a.totals = totals.data();
  a.views[mbk::kLosses] = {memory.data(), DType::f32, {stride}};
  tier.sum(a);
  return totals.merged();
}

}  // namespace

int64_t numbers_fma(const Options& options) {
  const mbk::DefaultEnvironment environment;
  std::vector<float> edges;
  for (const uint32_t e :
       {0u, 1u, 2u, 23u, 24u, 64u, 103u, 126u, 127u, 128u, 150u, 200u, 254u, 255u})
    for (const uint32_t f : {0u, 1u, 0x400000u, 0x7fffffu})
      edges.push_back(float_of(e << 23 | f)), edges.push_back(-edges.back());
  int64_t count = 0;
  for (const float a : edges)
    for (const float b : edges)
      for (const float c : edges) check_fma(a, b, c), ++count;
  Random r{1};
  for (int64_t i = 0; i < (options.quick ? 100'000 : 10'000'000); ++i, ++count) {
    const float a = r.any_float(), b = r.any_float();
    float c = r.any_float();
    if (i % 2) {  // near -a b, or within a few bits of where its last bit counts
      const uint32_t product = m::bits(-a * b) ^ (r.one_in(2) ? 0x80000000u : 0);
      const uint32_t near = (uint32_t)r.below(7) - 3, binades = (uint32_t)(r.below(53) - 26);
      c = float_of(product + near + (binades << 23));
    }
    check_fma(a, b, c);
  }
  return count;
}

int64_t numbers_storage(const Options&) {
  const mbk::DefaultEnvironment environment;
  return check_storage<m::bf16>(DType::bf16) + check_storage<m::f16>(DType::f16);
}

int64_t numbers_exact_sum(const Options& options) {
  const mbk::DefaultEnvironment environment;
  const auto& tiers = mbk::available_backends();
  Random r{2};
  int64_t count = 0;
  for (int64_t round = 0; round < (options.quick ? 200 : 4000); ++round) {
    const int kind = (int)(round % 6);  // 5: a mixture
    const int64_t n = 1 + (round % 50 == 0 ? 20000 + r.below(20000) : r.below(70));
    std::vector<float> terms;
    Wide exact;
    ExactSumState parts[3]{}, whole{}, merged{};
    for (int64_t i = 0; i < n; ++i) {
      float x = term_of_kind(r, kind == 5 ? (int)r.below(5) : kind);
      if (i && r.one_in(4)) x = -terms[(size_t)r.below(i)];  // exact cancellation
      terms.push_back(x);
      exact.add(x);
      mbk::exact_add(parts[r.below(3)], &x, 1);
    }
    mbk::exact_add(whole, terms.data(), n);
    for (const ExactSumState& part : parts) mbk::exact_merge(merged, part);
    CHECK(!memcmp(&whole, &merged, sizeof whole), "in parts it is %a, not %a",
          mbk::exact_value(merged), mbk::exact_value(whole));
    check_rounding(whole, exact);
    if (round % 7 == 0) {  // terms that are no numbers are counted, the others still summed
      terms[(size_t)r.below(n)] = INFINITY;
      if (round % 2) terms[(size_t)r.below(n)] = -INFINITY;
      if (round % 3 == 0) terms[(size_t)r.below(n)] = NAN;
      whole = ExactSumState{};
      mbk::exact_add(whole, terms.data(), n);
      double plain = 0;
      for (const float x : terms) plain += isfinite(x) ? 0 : x;
      const double got = mbk::exact_value(whole);
      CHECK(got == plain || (got != got && plain != plain), "%a, not %a", got, plain);
    }
    for (size_t t = 0; t < tiers.size(); ++t) {
      const ExactSumState sum = sum_of(*tiers[t], terms, 1 + round % 3);
      CHECK(!memcmp(&sum, &whole, sizeof sum), "%s: %lld terms of kind %d sum to %a, not %a",
            tiers[t]->name, (long long)n, kind, mbk::exact_value(sum), mbk::exact_value(whole));
      for (const int64_t limb : sum.limb) digest_of(t).add((uint64_t)limb);
    }
    count += n * (int64_t)(1 + tiers.size());
  }
  return count;
}

int64_t numbers_sum_few(const Options& options) {
  const mbk::DefaultEnvironment environment;
  Random r{3};
  int64_t count = 0;
  for (int64_t round = 0; round < (options.quick ? 10'000 : 1'000'000); ++round) {
    const int kind = (int)(round % 7);  // 6: a mixture
    const int64_t n = 1 + r.below(round % 10 ? m::kScalar : m::kFlush);
    float terms[m::kFlush + m::lanes<m::f32v>] = {};
    Wide exact;
    for (int64_t i = 0; i < n; ++i) {
      terms[i] = term_of_kind(r, kind == 6 ? (int)r.below(6) : kind);
      if (i && r.one_in(8)) terms[i] = -terms[r.below(i)];
      exact.add(terms[i]);
    }
    const float got = m::sum_few(terms, n), want = (float)exact.value(kFormats[0]);
    CHECK(got == want, "%lld terms of kind %d sum to %a, not %a", (long long)n, kind, got, want);
    ++count;
  }
  return count;
}

}  // namespace test
