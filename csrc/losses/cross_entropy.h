#pragma once
#include "core/args.h"
#include "core/dtype.h"
#include "core/math.h"
#include "core/math64.h"

namespace mbk::MBK_ISA {

// Softmax cross-entropy of one item with logits x_1 .. x_C, with torch's class weights w and label
// smoothing eps, and a penalty z on the squared log-sum-exp:
//
//   c_j  = cap tanh(x_j / cap)                 soft cap; c_j = x_j without it
//   m    = max c_j,  e_j = exp(c_j - m),  S = sum e_j,  lse = m + log S
//   loss = sum_j q_j (lse - c_j) + z lse^2
//   dloss/dc_j = (Q + 2 z lse) e_j / S - q_j,   Q = sum q_j
//
//   class index t:   q_j = (1 - eps) w_t [j = t] + eps/C w_j
//   probabilities p: q_j = w_j ((1 - eps) p_j + eps/C)
//
// The term of t is left out of the sum, R = S - e_t, because everything that is small when t is
// nearly certain is a function of R: log S = log1p(R), and p_t - 1 = -R / S, without cancellation
// however near p_t is to 1. With probabilities t is the first maximum, e_t = 1, whose q_t is left
// out of Q as well, so that it is not taken from a sum that has it: with Q' = Q - q_t (for an
// index: of the smoothing alone)
//
//   dloss/dc_t = ((Q' + 2 z lse) e_t - q_t R) / S
//
// The soft cap's slope dc_j/dx_j = 1 - tanh^2 is formed from x_j, not from c_j, whose digits do not
// reach 1 - (c_j / cap)^2 where that is small: with E = exp(-2 |x_j| / cap) and w = 2 E / (1 + E),
// which is 1 - |tanh|, it is 2 w - w^2.
enum class Targets { kIndex, kSmoothedIndex, kProbabilities };

template <Targets kTargets, bool kSoftcap>
struct SoftmaxCrossEntropy {
  static constexpr bool kHasIndex = kTargets != Targets::kProbabilities;
  static constexpr bool kHasSoftcap = kSoftcap;
  static constexpr bool kHasCoefficients = kTargets != Targets::kIndex;  // q_j of the classes but t
  enum Sum { kRest, kDistance, kCoefficients };                          // R; sum q_j (m - c_j); Q'
  static constexpr int kSums = kTargets == Targets::kIndex ? 1 : kHasIndex ? 2 : 3;
  // Probabilities may have any sign and size, so their distances may cancel: added up in fp64.
  static constexpr bool kWideDistance = kTargets == Targets::kProbabilities;

  // What is the same for every item of a call, in the type T of the element loops.
  template <class T>
  struct Call {
    T cap, inverse_cap, fall;  // fall = -2 / cap
    T keep, spread;            // 1 - eps, eps / C
    double keep64, coefficients, z_loss;

    MBK_FN explicit Call(const RowArgs& a)
        : cap((T)a.softcap),
          inverse_cap((T)(1.0 / a.softcap)),
          fall((T)-2 * inverse_cap),
          keep((T)(1.0 - a.label_smoothing)),
          spread((T)(a.label_smoothing / (double)a.columns)),
          keep64(1.0 - a.label_smoothing),
          coefficients(kHasCoefficients
                           ? a.label_smoothing / (double)a.columns * read(a.class_weight_sum)
                           : 0),
          z_loss(a.z_loss) {}
  };

  template <class V>
  MBK_FN static V logit(const Call<Element<V>>& call, V x) {
    if constexpr (kSoftcap) {
      return tanh(x * call.inverse_cap) * call.cap;
    } else {
      return x;
    }
  }

  // dc/dx; of several vectors at once.
  template <class V, int n>
  MBK_FN static void slopes(const Call<Element<V>>& call, const V (&x)[n], V (&slope)[n]) {
    V d[n], e[n];
    for (int u = 0; u < n; ++u) d[u] = abs(x[u]) * call.fall;
    exp_nonpositive(d, e);
    for (int u = 0; u < n; ++u) {
      const V w = (e[u] + e[u]) / (splat<V>(1) + e[u]);
      slope[u] = multiply_add(-w, w, w + w);
    }
  }
  template <class V>
  MBK_FN static V slope(const Call<Element<V>>& call, V x) {
    const V one[1] = {x};
    V slope[1];
    slopes(call, one, slope);
    return slope[0];
  }

  // q_j of a class that is not the target index.
  template <class V>
  MBK_FN static V coefficient(const Call<Element<V>>& call, V weight, V probability) {
    if constexpr (kHasIndex) {
      return weight * call.spread;
    } else {
      return weight * multiply_add(probability, splat<V>(call.keep), splat<V>(call.spread));
    }
  }

  // e_j, of the distance c_j - m; of several vectors at once.
  template <class V>
  MBK_FN static V term(V distance) {
    return exp_nonpositive(distance);
  }
  template <class V, int n>
  MBK_FN static void terms(const V (&distance)[n], V (&e)[n]) {
    exp_nonpositive(distance, e);
  }

  // Adds q_j (m - c_j) to a sum.
  template <class V>
  MBK_FN static V add_distance(V distance, V q, V sum) {
    return multiply_add(-q, distance, sum);
  }

  // The end of a row, in fp64: D is double, or a vector of them with an item in each lane.
  template <class D>
  struct Item {
    D max, target_logit, target_term;
    D target_weight;  // w_t of an index, q_t of the first maximum
    D target_slope;   // of the soft cap; of the gradient alone
    D scale;
    D sums[3];
  };
  // log S. S - 1 is R, exactly, where the term kept apart is the maximum's.
  template <class D>
  MBK_FN static D log_sum(const Item<D>& item) {
    const D one = splat<D>(1.0), rest = item.sums[kRest];
    return log1p(select(item.target_term == one, rest, (rest - 1.0) + item.target_term));
  }
  // Q'.
  template <class D, class T>
  MBK_FN static D others(const Call<T>& call, const Item<D>& item) {
    return kTargets == Targets::kProbabilities   ? item.sums[kCoefficients]
           : kTargets == Targets::kSmoothedIndex ? splat<D>(call.coefficients)
                                                 : splat<D>(0.0);
  }
  template <class D, class T>
  MBK_FN static D loss(const Call<T>& call, const Item<D>& item, D log_s) {
    const D lse = item.max + log_s;
    // Not lse * lse * 0: the square of an fp64 logit overflows.
    D loss = call.z_loss != 0 ? lse * lse * call.z_loss : splat<D>(0.0);
    if constexpr (kHasIndex)
      loss = item.target_weight * call.keep64 * ((item.max - item.target_logit) + log_s) + loss;
    if constexpr (kHasCoefficients) {
      D q = others(call, item);
      if constexpr (!kHasIndex) q = q + item.target_weight;
      loss = (q * log_s + item.sums[kDistance]) + loss;
    }
    return loss;
  }
  template <class D>
  struct Factors {
    D all, target;  // dloss/dc_j = all e_j - scale q_j for j other than t, and `target` for t
  };
  // log_s is used with a z-loss only: without it the gradient need not wait for the logarithm.
  template <class D, class T>
  MBK_FN static Factors<D> factors(const Call<T>& call, const Item<D>& item, D log_s) {
    const D rest = item.sums[kRest];
    const D certain = kHasIndex ? item.target_weight * call.keep64 : item.target_weight;
    D pull = others(call, item);
    if (call.z_loss != 0) pull = pull + (item.max + log_s) * (2.0 * call.z_loss);
    const D unit = item.scale / (rest + item.target_term);
    Factors<D> f;
    f.all = (certain + pull) * unit;
    f.target = (pull * item.target_term - certain * rest) * unit;
    if constexpr (kHasIndex && kHasCoefficients)
      f.target = f.target - item.scale * (item.target_weight * (double)call.spread);
    if constexpr (kSoftcap) f.target = f.target * item.target_slope;
    return f;
  }

  // d(result)/d(x_j) for j other than t. The slope is used with a soft cap only.
  template <class V>
  MBK_FN static V gradient(V term, V slope, V q, V factor, V scale) {
    V g;
    if constexpr (kHasCoefficients) {
      g = multiply_add(term, factor, -(q * scale));
    } else {
      g = term * factor;
    }
    if constexpr (kSoftcap) g = g * slope;
    return g;
  }
};

struct CrossEntropy {
  static constexpr const char* name = "cross_entropy";

  // Calls f with the member of the family that the arguments ask for.
  template <class F>
  MBK_HOST_FN static void visit(const RowArgs& a, F f) {
    if (!a.target_is_index) {
      a.softcap != 0 ? f(SoftmaxCrossEntropy<Targets::kProbabilities, true>{})
                     : f(SoftmaxCrossEntropy<Targets::kProbabilities, false>{});
    } else if (a.label_smoothing != 0) {
      a.softcap != 0 ? f(SoftmaxCrossEntropy<Targets::kSmoothedIndex, true>{})
                     : f(SoftmaxCrossEntropy<Targets::kSmoothedIndex, false>{});
    } else {
      a.softcap != 0 ? f(SoftmaxCrossEntropy<Targets::kIndex, true>{})
                     : f(SoftmaxCrossEntropy<Targets::kIndex, false>{});
    }
  }
};

}  // namespace mbk::MBK_ISA
