// Accuracy and equality of the elementary functions: all 2^32 inputs in fp32, a sample in fp64.
//
// Every tier that this processor supports must give the same bits. Errors are measured against the
// C library's fp64 functions (fp32) or long double functions (fp64), in ulp: units in the last
// place of a number of the tested type in the binade of the exact result. A result that is special
// (NaN, infinity, zero) must be that very result: the one NaN, the right sign of zero.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "core/environment.h"
#include "cpu/dispatch.h"

namespace {

using mbk::Backend;

constexpr int64_t kChunk = 1 << 15;  // inputs a task: all buffers stay in the L2 cache
constexpr bool kHaveWide = LDBL_MANT_DIG >= 64;

// ---- The exact functions ------------------------------------------------------------------------

struct Function {
  const char* name;
  double bound[2];  // ulp: fp32, fp64
  double (*exact)(double);
  long double (*precise)(long double);
};

double exp_nonpositive(double x) { return x >= -80 ? exp(x) : 0; }
long double exp_nonpositive_l(long double x) { return x >= -700 ? expl(x) : 0; }
double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}
long double sigmoid_l(long double x) {
  const long double e = expl(-fabsl(x));
  return (x < 0 ? e : 1) / (1 + e);
}
double softplus(double x) { return (x < 0 ? 0 : x) + log1p(exp(-fabs(x))); }
long double softplus_l(long double x) { return (x < 0 ? 0 : x) + log1pl(expl(-fabsl(x))); }
// log(1 + 2 sinh^2(x / 2)) where log(cosh(x)) would cancel, and without overflow elsewhere.
double log_cosh(double x) {
  const double a = fabs(x), s = sinh(a < 1 ? a / 2 : 0);
  return a < 1 ? log1p(2 * s * s) : a - M_LN2 + log1p(exp(-2 * a));
}
long double log_cosh_l(long double x) {
  const long double a = fabsl(x), s = sinhl(a < 1 ? a / 2 : 0);
  return a < 1 ? log1pl(2 * s * s) : a - 0.693147180559945309417232121458L + log1pl(expl(-2 * a));
}

constexpr Function kFunctions[] = {
    {"exp_nonpositive", {0.9, 1.5}, exp_nonpositive, exp_nonpositive_l},
    {"exp", {0.9, 1.5}, exp, expl},
    {"expm1", {2, 2}, expm1, expm1l},
    {"log", {2, 2}, log, logl},
    {"log1p", {2, 2}, log1p, log1pl},
    {"sigmoid", {2, 2}, sigmoid, sigmoid_l},
    {"softplus", {2, 2}, softplus, softplus_l},
    {"tanh", {2, 2}, tanh, tanhl},
    {"log_cosh", {2, 7}, log_cosh, log_cosh_l},
    {"log_cosh_slope", {2, 2}, tanh, tanhl},
};

// ---- Per type -----------------------------------------------------------------------------------

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Type;
template <>
struct Type<float> {
  using Bits = uint32_t;
  using Wide = double;
  static constexpr int digits = FLT_MANT_DIG, min_exponent = FLT_MIN_EXP - 1, index = 0;
  static constexpr Bits nan = 0x7fc00000;
  static constexpr const char* name = "fp32";
  static double exact(const Function& f, double x) { return f.exact(x); }
  static auto entry(const mbk::Elementary& e) { return e.f32; }
};
template <>
struct Type<double> {
  using Bits = uint64_t;
  using Wide = long double;
  static constexpr int digits = DBL_MANT_DIG, min_exponent = DBL_MIN_EXP - 1, index = 1;
  static constexpr Bits nan = 0x7ff8000000000000;
  static constexpr const char* name = "fp64";
  static long double exact(const Function& f, long double x) { return f.precise(x); }
  static auto entry(const mbk::Elementary& e) { return e.f64; }
};

double power_of_two(int e, double) { return bit_cast<double>(uint64_t(1023 + e) << 52); }
long double power_of_two(int e, long double) { return ldexpl(1, e); }
int exponent(double x) { return int(bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023; }
int exponent(long double x) { return x == 0 ? INT32_MIN / 2 : ilogbl(x); }

// The error of y in ulp; infinite where a special result is wrong.
template <class T, class Wide>
double error(T y, Wide exact) {
  using B = typename Type<T>::Bits;
  if (exact != exact) return bit_cast<B>(y) == Type<T>::nan ? 0 : INFINITY;
  const T nearest = T(exact);
  if (exact == 0 || isinf(nearest) || isinf(y))
    return bit_cast<B>(y) == bit_cast<B>(nearest) ? 0 : INFINITY;
  const int e = exponent(exact);
  const int last = (e < Type<T>::min_exponent ? Type<T>::min_exponent : e) - (Type<T>::digits - 1);
  const Wide difference = Wide(y) - exact;
  return double((difference < 0 ? -difference : difference) * power_of_two(-last, exact));
}

// ---- Inputs -------------------------------------------------------------------------------------

struct Options {
  uint64_t stride = 1, samples = 20'000'000, seed = 1;
  int threads = 2;
  bool markdown = false;
  std::vector<std::string> names;
};

bool nonpositive(const Function& f) { return f.exact == exp_nonpositive; }

// Every bit pattern; for exp_nonpositive those with the sign bit, and +0 at the end.
uint64_t count(const Function& f, const Options& o, float) {
  return ((nonpositive(f) ? (uint64_t(1) << 31) + 1 : uint64_t(1) << 32) + o.stride - 1) / o.stride;
}
float input(const Function& f, const Options& o, uint64_t i, float) {
  return bit_cast<float>(uint32_t(i * o.stride + (nonpositive(f) ? 0x80000000u : 0)));
}

uint64_t random_bits(uint64_t i) {  // splitmix64
  i = (i + 1) * 0x9e3779b97f4a7c15;
  i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9;
  i = (i ^ i >> 27) * 0x94d049bb133111eb;
  return i ^ i >> 31;
}

// First the edges: 64 neighbours of each +-2^k and +-sqrt(2) 2^k, of 2^k - 1 as log1p sees them,
// and of each multiple of ln(2) / 4, where reductions switch. Then three samples in turn: any bits;
// a number in [-2, 2); a magnitude in [2^-60, 2^12).
constexpr uint64_t kPowers = 2 * 2 * 2048, kShifted = 2 * 128, kMultiples = 2 * 4400;
constexpr uint64_t kEdges = 64 * (kPowers + kShifted + kMultiples);

uint64_t count(const Function&, const Options& o, double) {
  return o.samples ? kEdges + o.samples : 0;
}
double edge(uint64_t i) {
  if (i < kPowers) return bit_cast<double>(i >> 1 << 52 | (i & 1 ? 0x6a09e667f3bcd : 0));
  i -= kPowers;
  if (i < kShifted) return ldexp(i & 1 ? M_SQRT2 : 1, int(i / 2) - 64) - 1;
  i -= kShifted;
  return (double(i) - kMultiples / 2) * (M_LN2 / 4);
}
double sample(uint64_t seed, uint64_t i) {
  const uint64_t bits = random_bits(seed << 40 ^ i), mantissa = bits & 0xfffffffffffff;
  if (i % 3 == 0) return bit_cast<double>(bits);
  if (i % 3 == 1) return 4 * (bit_cast<double>(uint64_t(1023) << 52 | mantissa) - 1) - 2;
  const uint64_t sign = bits >> 63, exponent = (bits >> 52 & 0x7ff) % 72 + 1023 - 60;
  return bit_cast<double>(sign << 63 | exponent << 52 | mantissa);
}
double input(const Function& f, const Options& o, uint64_t i, double) {
  const double x = i < kEdges ? bit_cast<double>(bit_cast<uint64_t>(edge(i / 64)) + i % 64 - 32)
                              : sample(o.seed, i);
  return nonpositive(f) && x > 0 ? -x : x;
}

// ---- The run ------------------------------------------------------------------------------------

struct Result {
  uint64_t inputs = 0, differing = 0, misrounded = 0, digest = 0, worst_index = 0;
  double worst = -1, worst_at = 0, seconds = 0;
};

constexpr uint64_t kFnvBasis = 0xcbf29ce484222325, kFnvPrime = 0x100000001b3;
uint64_t fnv(uint64_t hash, uint64_t word) { return (hash ^ word) * kFnvPrime; }

template <class T>
void run_chunk(const Function& f, const Options& o,
               const std::vector<const mbk::Elementary*>& tiers, uint64_t first, int64_t n,
               Result& r, uint64_t& digest) {
  using B = typename Type<T>::Bits;
  thread_local std::vector<T> x(kChunk), y(kChunk), other(kChunk);
  for (int64_t i = 0; i < n; ++i) x[i] = input(f, o, first + i, T{});
  Type<T>::entry (*tiers[0])(x.data(), y.data(), n);
  for (size_t t = 1; t < tiers.size(); ++t) {
    Type<T>::entry (*tiers[t])(x.data(), other.data(), n);
    if (memcmp(y.data(), other.data(), n * sizeof(T)))
      for (int64_t i = 0; i < n; ++i) r.differing += bit_cast<B>(y[i]) != bit_cast<B>(other[i]);
  }
  digest = kFnvBasis;
  for (int64_t i = 0; i < n; ++i) {
    digest = fnv(digest, bit_cast<B>(y[i]));
    double e = error(y[i], Type<T>::exact(f, x[i]));
    if (kHaveWide && fabs(e - 0.5) < 0x1p-20) e = error(y[i], f.precise(x[i]));  // nearly a tie
    r.misrounded += e > 0.5;
    if (e > r.worst) r.worst = e, r.worst_index = first + i;
  }
  r.inputs += n;
}

template <class T>
Result run(const Function& f, const Options& o) {
  std::vector<const mbk::Elementary*> tiers;
  for (const Backend* b : mbk::available_backends())
    for (const mbk::Elementary* e = b->elementary; e->name; ++e)
      if (!strcmp(e->name, f.name)) tiers.push_back(e);
  if (tiers.size() != mbk::available_backends().size()) {
    fprintf(stderr, "exhaustive: a tier lacks %s\n", f.name);
    exit(1);
  }
  const uint64_t total = count(f, o, T{}), chunks = (total + kChunk - 1) / kChunk;
  std::vector<uint64_t> digests(chunks);
  std::vector<Result> partial(o.threads);
  std::atomic<uint64_t> next{0};
  const auto begin = std::chrono::steady_clock::now();
  auto work = [&](Result& r) {
    const mbk::DefaultEnvironment environment;
    for (uint64_t c; (c = next++) < chunks;) {
      const uint64_t first = c * kChunk, rest = total - first;
      run_chunk<T>(f, o, tiers, first, rest < kChunk ? rest : kChunk, r, digests[c]);
    }
  };
  std::vector<std::thread> threads;
  for (Result& r : partial) threads.emplace_back(work, std::ref(r));
  for (std::thread& t : threads) t.join();

  Result all;
  all.digest = kFnvBasis;
  for (uint64_t d : digests) all.digest = fnv(all.digest, d);
  for (const Result& r : partial) {
    all.inputs += r.inputs, all.differing += r.differing, all.misrounded += r.misrounded;
    // Of equal errors the first, so that the report does not depend on the threads.
    if (r.worst > all.worst || (r.worst == all.worst && r.worst_index < all.worst_index))
      all.worst = r.worst, all.worst_index = r.worst_index;
  }
  all.worst_at = input(f, o, all.worst_index, T{});
  all.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return all;
}

template <class T>
bool report(const Function& f, const Options& o) {
  const Result r = run<T>(f, o);
  const double bound = f.bound[Type<T>::index];
  const bool good = r.differing == 0 && r.worst <= bound;
  printf(o.markdown ? "| %s | %s | %llu | %.4f | %a | %.2f | %llu | %.2f %% | %016llx | %s |\n"
                    : "%-16s %s %11llu %9.4f %24a %6.2f %11llu %6.2f%% %016llx %s",
         f.name, Type<T>::name, (unsigned long long)r.inputs, r.worst, r.worst_at, bound,
         (unsigned long long)r.misrounded, 100.0 * r.misrounded / r.inputs,
         (unsigned long long)r.digest,
         good          ? "ok"
         : r.differing ? "TIERS DIFFER"
                       : "BOUND BROKEN");
  if (!o.markdown) printf("  %.0f s\n", r.seconds);
  if (r.differing)
    printf("  %s: %llu results differ between tiers\n", f.name, (unsigned long long)r.differing);
  fflush(stdout);
  return good;
}

[[noreturn]] void usage(const char* problem) {
  fprintf(stderr,
          "exhaustive: %s\n"
          "usage: exhaustive [options] [function ...]   (default: all functions)\n"
          "  --stride K    only every K-th fp32 input; 0: no fp32\n"
          "  --samples N   random fp64 inputs for each function, besides the edges; 0: no fp64\n"
          "  --seed S      of the fp64 inputs\n"
          "  --threads T\n"
          "  --markdown    the report as a Markdown table\n"
          "functions:",
          problem);
  for (const Function& f : kFunctions) fprintf(stderr, " %s", f.name);
  fprintf(stderr, "\n");
  exit(2);
}

uint64_t number(const char* option, const char* text) {
  char* end = nullptr;
  const uint64_t n = text ? strtoull(text, &end, 10) : 0;
  if (!text || end == text || *end) usage((std::string(option) + " needs a number").c_str());
  return n;
}

Options parse(char** argument) {
  Options o;
  while (const char* a = *++argument) {
    const std::string s = a;
    if (s == "--markdown") {
      o.markdown = true;
    } else if (s == "--stride") {
      o.stride = number(a, *++argument);
    } else if (s == "--samples") {
      o.samples = number(a, *++argument);
    } else if (s == "--seed") {
      o.seed = number(a, *++argument);
    } else if (s == "--threads") {
      o.threads = int(number(a, *++argument));
      if (o.threads < 1 || o.threads > 1024) usage("--threads must be between 1 and 1024");
    } else {
      bool known = false;
      for (const Function& f : kFunctions) known |= s == f.name;
      if (!known) usage(("unknown option or function " + s).c_str());
      o.names.push_back(s);
    }
  }
  return o;
}

}  // namespace

int main(int, char** argument) {
  const Options o = parse(argument);
  std::string tiers;
  for (const Backend* b : mbk::available_backends()) tiers += std::string(" ") + b->name;
  printf("tiers compared:%s; threads: %d; stride: %llu; fp64 seed: %llu%s", tiers.c_str(),
         o.threads, (unsigned long long)o.stride, (unsigned long long)o.seed,
         o.markdown ? "\n\n" : "\n");
  if (o.markdown) {
    printf(
        "| function | type | inputs | worst (ulp) | at | bound | not correctly rounded | | digest "
        "| |\n");
    printf("|---|---|--:|--:|--:|--:|--:|--:|---|---|\n");
  } else {
    printf("%-16s %s %11s %9s %24s %6s %11s %7s %16s\n", "function", "type", "inputs", "worst ulp",
           "at", "bound", "misrounded", "", "digest");
  }
  if (o.samples && !kHaveWide)
    fprintf(stderr, "exhaustive: fp64 skipped: long double is no wider than double here\n");

  fflush(stdout);

  bool good = true;
  for (const Function& f : kFunctions) {
    bool wanted = o.names.empty();
    for (const std::string& name : o.names) wanted |= name == f.name;
    if (wanted && o.stride) good &= report<float>(f, o);
    if (wanted && o.samples && kHaveWide) good &= report<double>(f, o);
  }
  return good ? 0 : 1;
}
