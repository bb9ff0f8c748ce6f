// The price of reproducibility: the row loop of cross-entropy, forward and gradient in place, twice
// in one program. "canonical" is the library's own: sums in blocks that are joined exactly, the
// target's term kept apart, an exact sum of the losses. "plain" is its twin with what one would
// write without the contract: one fp32 accumulator a lane along the whole row, an fp32 sum of the
// losses. Maximum, exponential, prefetching and gradient are the library's own code in both, so a
// change of its internal interfaces must be followed here. One thread; the twins alternate over the
// same batch, and restoring the logits is not timed.
//
//   g++ -std=c++17 -O3 -march=x86-64-v4 -fschedule-insns -falign-functions=64 -falign-loops=64
//       -DMBK_ISA=avx512 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi
//       -I csrc bench/twin.cpp -o twin
//   ./twin [milliseconds a measurement] [--raw: one line "columns twin error ns ns ..." each]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <random>
#include <vector>

#include "core/environment.h"
#include "cpu/long_rows.h"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

typedef SoftmaxCrossEntropy<Targets::kIndex, false> Loss;
typedef LongRow<Loss, float, float, false> Canonical;

struct Plain : Canonical {
  using Canonical::Canonical;

  MBK_PASS float terms(const PaddedRow<float>& x, float m, float* to, float* tail_to,
                       const NextRows& next) const {
    V sum[kUnroll];
    for (int k = 0; k < kUnroll; ++k) sum[k] = V{};
    for (int64_t j = 0; j < args.columns; j += kGroup) {
      const float* from = x.group(j);
      float* const out = j == x.tail ? tail_to : to + j;
      prefetch(next.input, j * (int64_t)sizeof(float), kGroup * sizeof(float));
      for (int first = 0; first < kUnroll; first += kAtOnce) {
        V distance[kAtOnce], e[kAtOnce];
        for (int u = 0; u < kAtOnce; ++u) distance[u] = load<V>(from + (first + u) * kLanes) - m;
        Loss::terms(distance, e);
        for (int u = 0; u < kAtOnce; ++u) {
          store(out + (first + u) * kLanes, e[u]);
          sum[first + u] = sum[first + u] + e[u];
        }
      }
    }
    for (int k = 1; k < kUnroll; ++k) sum[0] = sum[0] + sum[k];
    return sum_lanes(sum[0]);
  }

  MBK_FN void item(int64_t, const ItemPosition& at, const float* row, const float*, float* grad,
                   const NextRows& next, float& total) const {
    const int64_t target = item_target(args, at);
    const PaddedRow<float> x(row, args.columns, -__builtin_inff());
    const float m = maximum(x).value, logit = row[target], scale = (float)item_scale(args, at);
    const Coefficients<Loss, float> none(args, nullptr);
    float kept_tail[kGroup];
    const float s = terms(x, m, grad, kept_tail, next);
    this->template gradient<true>((const float*)grad, kept_tail, m, scale / s, scale, none, grad,
                                  next);
    grad[target] -= scale;
    total += m + mbk::MBK_ISA::log(s) - logit;
  }
};

// Adds losses up, each twin in its own way.
struct ExactTotal {
  ExactSumState state{};
  LossQueue<Loss, float> losses;
  ExactTotal(const RowArgs& args, const Canonical& row) : losses(args, row.call, &state) {}
  LossQueue<Loss, float>& sink() { return losses; }
  double value() {
    if (losses.count) losses.flush();
    return round_exact(state, false);
  }
};
struct PlainTotal {
  float sum = 0;
  PlainTotal(const RowArgs&, const Canonical&) {}
  float& sink() { return sum; }
  double value() const { return sum; }
};

struct Batch {
  int64_t rows, columns;
  std::vector<float> pristine;
  float* const logits;  // aligned to a cache line, as a tensor's memory is
  std::vector<int64_t> target;
  std::vector<char> scratch;
  RowArgs args{};

  Batch(int64_t r, int64_t c)
      : rows(r),
        columns(c),
        pristine((size_t)(r * c)),
        logits((float*)aligned_alloc(64, (size_t)(r * c) * sizeof(float))),
        target((size_t)r),
        scratch((size_t)row_scratch_bytes(c, sizeof(float))) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 2);
    for (float& x : pristine) x = normal(random);
    for (int64_t& t : target) t = (int64_t)(random() % (uint64_t)c);
    args.items = r;
    args.inner_size = 1;
    args.columns = c;
    args.input = args.grad = logits;
    args.input_strides = args.grad_strides = {c, 0, 1};
    args.target = target.data();
    args.target_is_index = true;
    args.target_type = IndexType::i64;
    args.target_strides = {1, 0, 0};
    args.ignore_index = -100;
    args.scale = {1.0, nullptr, DType::f64};
    args.denominator = {(double)r, nullptr, DType::f64};
    args.threads = 1;
    args.scratch = scratch.data();
  }
  ~Batch() { free(logits); }
  Batch(const Batch&) = delete;
  void restore() { std::copy(pristine.begin(), pristine.end(), logits); }
};

template <class Row, class Total>
MBK_PASS double run(Batch& b) {
  const DefaultEnvironment environment;
  const Row row(b.args, (float*)b.scratch.data());
  Total total(b.args, row);
  for (int64_t i = 0; i < b.rows; ++i) {
    float* const x = b.logits + i * b.columns;
    const int64_t after = i + 1 < b.rows ? i + 1 : i;
    const NextRows next{b.logits + after * b.columns, nullptr};
    row.item(i, ItemPosition(b.args, i), x, nullptr, x, next, total.sink());
  }
  return total.value();
}

// Largest error over the largest value, of the gradient in b.logits or of the loss.
double error(const Batch& b, double loss) {
  double worst = 0, exact_loss = 0;
  for (int64_t i = 0; i < b.rows; ++i) {
    const float* x = b.pristine.data() + i * b.columns;
    const float* g = b.logits + i * b.columns;
    const double m = *std::max_element(x, x + b.columns);
    double sum = 0;
    for (int64_t j = 0; j < b.columns; ++j) sum += ::exp((double)x[j] - m);
    exact_loss += m + ::log(sum) - x[b.target[i]];
    for (int64_t j = 0; j < b.columns; ++j) {
      const double p = ::exp((double)x[j] - m) / sum - (j == b.target[i] ? 1 : 0);
      worst = fmax(worst, fabs((double)g[j] * (double)b.rows - p));
    }
  }
  return fmax(worst, fabs(loss - exact_loss) / exact_loss);
}

double now() {  // nanoseconds
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

struct Twin {
  const char* name;
  double (*run)(Batch&);
  double worst;
  std::vector<double> samples;  // ns an element
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + (long)v.size() / 2, v.end());
  return v[v.size() / 2];
}

void measure(int64_t columns, double milliseconds, bool raw) {
  const int64_t elements = 2 << 20;  // 8 MiB: out of the second-level cache, like a batch of logits
  Batch b((elements + columns - 1) / columns, columns);
  Twin twins[] = {{"canonical", run<Canonical, ExactTotal>, 0, {}},
                  {"plain", run<Plain, PlainTotal>, 0, {}}};
  for (Twin& t : twins) {
    b.restore();
    t.worst = error(b, t.run(b));
  }
  const double start = now(), warm = start + 0.2e6 * milliseconds;
  const double end = start + 1.2e6 * milliseconds;
  std::vector<double> ratios;
  for (int rounds = 0; rounds < 8 || now() < end; ++rounds) {
    double took[2];
    for (int k = 0; k < 2; ++k) {
      b.restore();
      const double before = now();
      twins[k].run(b);
      took[k] = (now() - before) / (double)(b.rows * columns);
    }
    if (rounds < 3 || now() < warm) continue;
    for (int k = 0; k < 2; ++k) twins[k].samples.push_back(took[k]);
    ratios.push_back(took[0] / took[1]);
  }
  if (raw) {
    for (const Twin& t : twins) {
      printf("%lld %s %.3g", (long long)columns, t.name, t.worst);
      for (const double s : t.samples) printf(" %.5f", s);
      printf("\n");
    }
  } else {
    printf("%8lld %12.4f %8.4f %8.3f %6zu %12.1e %10.1e\n", (long long)columns,
           median(twins[0].samples), median(twins[1].samples), median(ratios), ratios.size(),
           twins[0].worst, twins[1].worst);
  }
  fflush(stdout);
}

}  // namespace
}  // namespace mbk::MBK_ISA

int main(int count, char** arguments) {
  const double milliseconds = count > 1 ? atof(arguments[1]) : 1000;
  const bool raw = count > 2;
  if (!raw)
    printf("%8s %12s %8s %8s %6s %12s %10s\n", "columns", "canonical", "plain", "ratio", "n",
           "error canon.", "plain");
  for (const int64_t columns : {1000, 4096, 32000, 128256})
    mbk::MBK_ISA::measure(columns, milliseconds, raw);
}
