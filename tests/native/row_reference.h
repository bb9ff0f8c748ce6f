#pragma once
// Cross-entropy problems, and what their results are in long double, with a bound on the error that
// the core's arithmetic may make.
#include <math.h>
#include <stdint.h>

#include <vector>

#include "check.h"

namespace test {

struct RowProblem {
  mbk::DType dtype;
  int64_t outer, inner, columns;      // items = outer * inner
  std::vector<double> x;              // items x columns; as are the probabilities
  std::vector<int64_t> target;        // empty with probabilities
  std::vector<double> probabilities;  // empty with class indices
  std::vector<double> class_weight, sample_weight, item_scale;  // empty: all one
  double smoothing, z_loss, softcap, scale;
  int64_t ignore_index;
  bool mean;

  int64_t items() const { return outer * inner; }
  mbk::DType compute() const {
    return dtype == mbk::DType::f64 ? mbk::DType::f64 : mbk::DType::f32;
  }
  bool ignored(int64_t i) const { return !target.empty() && target[(size_t)i] == ignore_index; }
  double weight(const std::vector<double>& w, int64_t i) const {
    return w.empty() ? 1 : w[(size_t)i];
  }
};

// Values that the storage type holds, some rows of them special.
inline RowProblem make_row_problem(Random& r, mbk::DType dtype, int64_t columns) {
  RowProblem p{};
  p.dtype = dtype, p.columns = columns;
  p.outer = columns > 512 ? 2 : 1 + r.below(3), p.inner = columns > 512 ? 3 : 1 + r.below(20);
  const size_t items = (size_t)p.items(), size = items * (size_t)columns;
  Buffer rounded(dtype, 1), wide(p.compute(), 1);
  const auto fill = [&r](std::vector<double>& v, size_t n, Buffer& storage, auto value) {
    v.resize(n);
    for (double& x : v) storage.set(0, value(r)), x = storage.get(0);
  };
  constexpr double kSpreads[] = {0.5, 4, 16, 100};
  const double spread = kSpreads[r.below(4)];
  fill(p.x, size, rounded, [&](Random& s) { return spread * s.symmetric(); });
  const auto positive = [](Random& s) { return s.one_in(20) ? 0 : 2 * s.uniform(); };
  if (r.one_in(2)) fill(p.class_weight, (size_t)columns, wide, positive);
  if (r.one_in(2)) fill(p.sample_weight, items, wide, positive);
  if (r.one_in(2)) fill(p.item_scale, items, wide, [](Random& s) { return 2 * s.symmetric(); });
  p.smoothing = r.one_in(2) ? 0.125 + 0.5 * r.uniform() : 0;
  p.z_loss = r.one_in(3) ? 0.01 * r.uniform() : 0;
  p.softcap = r.one_in(3) ? 1 + 30 * r.uniform() : 0;
  p.scale = r.one_in(2) ? 1 : 3 * r.uniform();
  p.mean = r.one_in(2);
  p.ignore_index = r.one_in(3) ? r.below(columns) : -100;
  if (r.one_in(3)) {
    fill(p.probabilities, size, rounded,
         [&](Random& s) { return 2 * s.uniform() / (double)columns; });
  } else {
    for (size_t i = 0; i < items; ++i)
      p.target.push_back(r.one_in(5) ? p.ignore_index : r.below(columns));
  }
  for (size_t i = 0; i < items; ++i) {
    double* const row = p.x.data() + i * (size_t)columns;
    const int64_t j = r.below(columns);
    switch (r.below(24)) {
      case 0:
        row[j] = NAN;
        break;
      case 1:
        row[j] = INFINITY;
        break;
      case 2:
        for (int64_t k = 0; k < columns; ++k) row[k] = -INFINITY;
        break;
      case 3:
      case 4:
        row[j] = -INFINITY;
        break;
      case 5:  // confident, perhaps wrongly
        row[r.one_in(2) || p.ignored((int64_t)i) || p.target.empty() ? j : p.target[i]] = 140;
        break;
      case 6:
        for (int64_t k = 0; k < columns; ++k) row[k] = k % 2 ? 0 : -0.0;
        break;
      case 7:
        if (!p.probabilities.empty()) p.probabilities[i * (size_t)columns + (size_t)j] = NAN;
        break;
      default:
        break;
    }
  }
  return p;
}

struct RowReference {
  std::vector<double> loss, loss_bound, grad, grad_bound;  // before the gradient is rounded
};

// With u the roundoff of the type T that is computed in, the terms e = exp(c - m) are off by
// u (|c - m| + 4) of themselves: the rounding of the distance, and the exponential's ulp or two.
// A sum of terms passes at most 32 additions; a soft cap moves a logit by 8 u of itself at most
// (tanh's 2 ulp, three products). The rest is the chain rule.
inline RowReference row_reference(const RowProblem& p, double divisor) {
  typedef long double Real;
  const bool index = p.probabilities.empty(), capped = p.softcap != 0;
  const Real u = roundoff(p.compute()), g = capped ? 8 * u : 0, eps = p.smoothing;
  const Real vanished = p.compute() == mbk::DType::f64 ? 1e-304L : 2e-35L;  // exp is cut off there
  const size_t columns = (size_t)p.columns;
  RowReference result;
  std::vector<Real> c(columns), t(columns), e(columns), q(columns), error(columns);
  Real class_weights = 0;
  for (size_t j = 0; j < columns; ++j) class_weights += p.weight(p.class_weight, (int64_t)j);
  for (int64_t i = 0; i < p.items(); ++i) {
    const auto all = [&](double loss, double grad) {
      result.loss.push_back(loss), result.loss_bound.push_back(0);
      result.grad.insert(result.grad.end(), columns, grad);
      result.grad_bound.insert(result.grad_bound.end(), columns, 0);
    };
    if (p.ignored(i)) {
      all(0, 0);
      continue;
    }
    Real m = -INFINITY;
    bool nan = false;
    for (size_t j = 0; j < columns; ++j) {
      const Real x = p.x[(size_t)i * columns + j];
      t[j] = capped ? tanhl(x / p.softcap) : 0;
      c[j] = capped ? p.softcap * t[j] : x;
      nan = nan || x != x;
      m = c[j] > m ? c[j] : m;
    }
    if (nan || !isfinite(m)) {
      all(NAN, NAN);
      continue;
    }
    const size_t target = index ? (size_t)p.target[(size_t)i] : columns;
    Real rest = 0, rest_error = 0, term = 0, term_error = 0, distance = 0, distance_error = 0,
         Q = 0;
    for (size_t j = 0; j < columns; ++j) {
      const Real d = c[j] - m, shift = g * (isfinite(d) ? fabsl(c[j]) + fabsl(m) : 0);
      e[j] = expl(d);
      error[j] = e[j] > 0 ? u * (fabsl(d) + 4) + shift : 0;
      (j == target ? term : rest) += e[j];
      (j == target ? term_error : rest_error) += e[j] * error[j];
      q[j] = p.weight(p.class_weight, (int64_t)j) *
             (index ? eps / columns
                    : (1 - eps) * p.probabilities[(size_t)i * columns + j] + eps / columns);
      if (!index || eps != 0) {
        distance -= q[j] * d;
        distance_error += q[j] != 0 ? q[j] * (40 * u * fabsl(d) + shift) : 0;
        Q += q[j];
      }
    }
    const Real s = rest + term, log_s = logl(s), lse = m + log_s;
    const Real rest_relative = rest > 0 ? rest_error / rest + 32 * u : 0;
    const Real s_relative = (rest * rest_relative + term_error) / s + (term == 1 ? 0 : 4 * u);
    const Real log_error = s_relative + 8 * u * log_s + vanished;
    const Real certain = index ? p.weight(p.class_weight, (int64_t)target) * (1 - eps) : 0;
    const Real others = index ? (eps != 0 ? eps / columns * class_weights : 0) : Q;
    const Real lse_error = log_error + g * fabsl(m) + 4 * u * fabsl(lse);
    const Real z = p.z_loss, sample = p.weight(p.sample_weight, i);
    Real loss = z * lse * lse, loss_error = z * (2 * fabsl(lse) * lse_error + 4 * u * lse * lse);
    if (index) {
      loss += certain * ((m - c[target]) + log_s);
      const Real gap = isfinite(c[target]) ? m - c[target] : 0;
      loss_error += certain * (log_error + 4 * u * gap +
                               g * (fabsl(m) + (isfinite(c[target]) ? fabsl(c[target]) : 0)));
    }
    loss += others * log_s + distance;
    loss_error += others * (log_error + 40 * u * log_s) + distance_error;
    result.loss.push_back((double)(loss * sample));
    result.loss_bound.push_back((double)(sample * (loss_error + 8 * u * fabsl(loss))));

    const Real scale = p.scale * p.weight(p.item_scale, i) * sample / divisor;
    const Real pull = others + 2 * z * lse, size = fabsl(scale);
    const Real pull_error = 40 * u * others + 2 * z * lse_error + 8 * u * fabsl(pull);
    for (size_t j = 0; j < columns; ++j) {
      const bool at = j == target;
      const Real share = e[j] / s, weight = certain + pull;
      const Real direct = at ? p.weight(p.class_weight, (int64_t)j) * eps / columns
                             : (!index || eps != 0 ? q[j] : 0);
      Real grad = at ? (pull * share - certain * (rest / s)) : weight * share;
      Real bound = at ? pull_error * share + fabsl(pull) * share * (error[j] + s_relative + 8 * u) +
                            certain * (rest / s) * (rest_relative + s_relative + 8 * u)
                      : (pull_error + 8 * u * certain) * share +
                            fabsl(weight) * (share * (error[j] + s_relative + 8 * u) + vanished);
      grad = (grad - direct) * scale, bound = (bound + 8 * u * direct) * size;
      if (capped) {
        const Real slope = 1 - t[j] * t[j];
        bound = bound * slope + fabsl(grad) * t[j] * t[j] * 40 * u;
        grad *= slope;
      }
      result.grad.push_back((double)grad);
      result.grad_bound.push_back((double)(bound + vanished * size + 4 * u * fabsl(grad)));
    }
  }
  return result;
}

}  // namespace test
