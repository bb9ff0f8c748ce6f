#pragma once
// Problems for losses of several rows an item, and the loss of an item in long double.
#include <math.h>
#include <stdint.h>

#include <vector>

#include "check.h"
#include "core/multirow_items.h"
#include "losses/all.h"

namespace test {
namespace {

using mbk::DType;
using mbk::ItemTarget;
using Real = long double;

constexpr int kLosses = mbk::MBK_ISA::MultirowLosses::size, kRows = mbk::kMaxRows;
enum {
  kNll,
  kMultiMargin,
  kMultilabelMargin,
  kMultilabelSoftMargin,
  kCosine,
  kTriplet,
  kDice,
  kKl,
  kJs,
  kTv,
  kEntropy,
  kFocal
};

const mbk::MBK_ISA::MultirowTraits& traits(int loss) { return mbk::MBK_ISA::multirow_traits(loss); }

struct Problem {
  int loss;
  DType type[kRows];
  int64_t outer, columns, inner;
  std::vector<double> x[kRows], class_weight, sample_weight, item_scale, label;
  std::vector<int64_t> target;  // one an item, or a list of `columns`
  int64_t ignore_index;
  double parameters[mbk::kRowParameters], scale;
  bool mean, wanted[kRows];
  int64_t items() const { return outer * inner; }
  DType compute() const {
    for (int k = 0; k < traits(loss).inputs; ++k)
      if (type[k] == DType::f64) return DType::f64;
    return DType::f32;
  }
};

Problem make_problem(Random& r, int loss, DType type, int64_t columns) {
  const auto& t = traits(loss);
  Problem p{};
  p.loss = loss, p.columns = columns;
  p.outer = 1 + r.below(3), p.inner = r.one_in(2) ? 1 : 1 + r.below(3);
  for (int k = 0; k < kRows; ++k) {
    p.type[k] = k > 0 && r.one_in(3) ? (DType)r.below(3) : type;
    p.wanted[k] = k < t.gradients && (k == 0 || r.one_in(2));
  }
  const bool unit = loss == kDice, odd = r.one_in(4);
  const double spread = unit ? 1 : loss == kMultilabelMargin ? 2 : r.one_in(3) ? 20 : 3;
  for (int k = 0; k < t.inputs; ++k) {
    Buffer cell(p.type[k], 1);
    for (int64_t n = 0; n < p.items() * columns; ++n) {
      const bool probability = unit || (loss == kMultilabelSoftMargin && k == 1);
      cell.set(0, probability ? r.uniform() : spread * r.symmetric());
      if (odd && r.one_in(3 * columns)) {
        constexpr double kSpecial[] = {NAN, INFINITY, -INFINITY, -0.0, 60000, -60000, 0x1p-24};
        cell.set(0, kSpecial[r.below(sizeof kSpecial / sizeof *kSpecial)]);
      }
      p.x[k].push_back(cell.get(0));
    }
  }
  Buffer cell(p.compute(), 1);
  const auto number = [&](double x) {
    cell.set(0, x);
    return cell.get(0);
  };
  if (r.one_in(2))
    for (int64_t i = 0; i < p.items(); ++i) p.sample_weight.push_back(number(2 * r.uniform()));
  if (r.one_in(2))
    for (int64_t i = 0; i < p.items(); ++i) p.item_scale.push_back(number(3 * r.symmetric()));
  if ((t.target_weights || t.column_weights) && r.one_in(2))
    for (int64_t j = 0; j < columns; ++j) p.class_weight.push_back(number(2 * r.uniform()));
  p.ignore_index = r.one_in(2) ? -100 : r.below(columns);
  if (t.target == ItemTarget::index && !(t.target_is_optional && r.one_in(2)))
    for (int64_t i = 0; i < p.items(); ++i)
      p.target.push_back(r.one_in(5) ? p.ignore_index : r.below(columns));
  if (t.target == ItemTarget::list)
    for (int64_t i = 0; i < p.items(); ++i) {
      const int64_t listed = std::min<int64_t>(r.below(6), columns);
      for (int64_t j = 0; j < columns; ++j)
        p.target.push_back(j == listed ? -1 : j < listed ? r.below(columns) : j);
    }
  if (t.target == ItemTarget::number)
    for (int64_t i = 0; i < p.items(); ++i)
      p.label.push_back(r.one_in(8) ? 0.5 : r.one_in(2) ? 1 : -1);
  double* const q = p.parameters;
  switch (loss) {
    case kMultiMargin:
      q[0] = 1 + (double)r.below(2), q[1] = 0.7;
      break;
    case kCosine:
      q[0] = -0.3;
      break;
    case kTriplet:
      q[0] = 5.7, q[1] = 1e-6, q[2] = (double)r.below(2);
      break;
    case kDice:
      q[0] = 1;
      break;
    case kKl:
      q[0] = 0.3, q[1] = (double)r.below(2), q[2] = 11.1;
      break;
    case kJs:
      q[0] = 0.3, q[1] = 0.4, q[2] = 11.1;
      break;
    case kTv:
      q[0] = 0.3, q[2] = 3.3;
      break;
    case kEntropy:
      q[0] = 0.3;
      break;
    case kFocal:
      q[0] = (double)r.below(4) * 0.75, q[1] = r.one_in(2) ? 1 : 0.3;
      break;
  }
  p.scale = r.one_in(2) ? 1 : 3 * r.symmetric();
  p.mean = r.one_in(2);
  return p;
}

// ---- the reference --------------------------------------------------------------------------

typedef std::vector<Real> Row;

Row log_softmax(const Row& x, Real s) {
  Real m = -INFINITY, sum = 0;
  for (const Real v : x) m = fmaxl(m, v);
  for (const Real v : x) sum += expl((v - m) * s);
  Row y;
  for (const Real v : x) y.push_back((v - m) * s - logl(sum));
  return y;
}
Real kl(const Row& p, const Row& q) {
  Real sum = 0;
  for (size_t j = 0; j < p.size(); ++j) sum += expl(p[j]) * (p[j] - q[j]);
  return sum;
}
Real softplus(Real x) { return fmaxl(x, 0) + log1pl(expl(-fabsl(x))); }

// The loss of an item, without its sample weight.
Real plain_loss(const Problem& p, int64_t i, const Row (&x)[kRows]) {
  const double* const q = p.parameters;
  const size_t columns = (size_t)p.columns;
  const auto weight = [&](size_t j) { return p.class_weight.empty() ? 1 : p.class_weight[j]; };
  const size_t t = p.target.empty() || traits(p.loss).target == ItemTarget::list
                       ? 0
                       : (size_t)p.target[(size_t)i];
  Real sum = 0;
  switch (p.loss) {
    case kNll:
      return -weight(t) * x[0][t];
    case kMultiMargin:
      for (size_t j = 0; j < columns; ++j)
        if (j != t) sum += powl(fmaxl(0, q[1] - x[0][t] + x[0][j]), q[0]);
      return sum * weight(t) / columns;
    case kMultilabelMargin: {
      const int64_t* const list = p.target.data() + i * p.columns;
      std::vector<bool> listed(columns);
      size_t n = 0;
      for (; n < columns && list[n] >= 0; ++n) listed[(size_t)list[n]] = true;
      for (size_t k = 0; k < n; ++k)
        for (size_t j = 0; j < columns; ++j)
          if (!listed[j]) sum += fmaxl(0, 1 - x[0][(size_t)list[k]] + x[0][j]);
      return sum / columns;
    }
    case kMultilabelSoftMargin:
      for (size_t j = 0; j < columns; ++j)
        sum += weight(j) * (x[1][j] * softplus(-x[0][j]) + (1 - x[1][j]) * softplus(x[0][j]));
      return sum / columns;
    case kCosine: {
      Real a = 1e-12, b = 1e-12;
      for (size_t j = 0; j < columns; ++j)
        sum += x[0][j] * x[1][j], a += x[0][j] * x[0][j], b += x[1][j] * x[1][j];
      const Real cosine = sum / sqrtl(a * b);
      const double label = p.label[(size_t)i];
      return label == 1 ? 1 - cosine : label == -1 ? fmaxl(0, cosine - q[0]) : 0;
    }
    case kTriplet: {
      const auto distance = [&](const Row& a, const Row& b) {
        Real d = 0;
        for (size_t j = 0; j < columns; ++j) d += (a[j] - b[j] + q[1]) * (a[j] - b[j] + q[1]);
        return sqrtl(d);
      };
      Real far = distance(x[0], x[2]);
      if (q[2] != 0) far = fminl(far, distance(x[1], x[2]));
      return fmaxl(0, q[0] + distance(x[0], x[1]) - far);
    }
    case kDice: {
      Real both = 0;
      for (size_t j = 0; j < columns; ++j) both += x[0][j] * x[1][j], sum += x[0][j] + x[1][j];
      return 1 - (2 * both + q[0]) / (sum + q[0]);
    }
    case kEntropy:
      return -kl(log_softmax(x[0], q[0]), Row(columns, 0));
    case kFocal: {
      for (size_t j = 0; j < columns; ++j)  // of the others, as parts of that of t
        if (j != t) sum += expl((x[0][j] - x[0][t]) * q[1]);
      const Real focus = q[0] == 0 ? 1 : powl(sum / (1 + sum), q[0]);
      return weight(t) * focus * log1pl(sum);
    }
  }
  const Row a = log_softmax(x[0], q[0]), b = log_softmax(x[1], q[0]);
  if (p.loss == kKl) return q[2] * (q[1] != 0 ? kl(a, b) : kl(b, a));
  Row m;
  for (size_t j = 0; j < columns; ++j) {
    sum += fabsl(expl(a[j]) - expl(b[j]));
    m.push_back(logl(q[1] * expl(b[j]) + (1 - q[1]) * expl(a[j])));
  }
  return p.loss == kTv ? q[2] * sum / 2 : q[2] * (q[1] * kl(b, m) + (1 - q[1]) * kl(a, m));
}

}  // namespace
}  // namespace test
