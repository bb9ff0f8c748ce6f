#pragma once
#include "core/math.h"
#include "core/math64.h"
#include "core/multirow_items.h"

namespace mbk::MBK_ISA {

// Distances between the distributions p = softmax(s x), the student's, and t = softmax(s y), the
// teacher's; s is an inverse temperature. With a = s (x - max x), e = exp(a), S = sum e:
//   p = e / S,  log p = a - log S,  and b, f, F for the teacher.
// A class index, where there is one, only says which items are ignored. Near the smallest loss the
// distances are sums of small terms of one sign, never differences of large ones.
//
// p - t is no difference of two rounded quotients, which would lose what columns that are alike on
// both sides have left: of a class that is nearly certain in both, of all but one where only that
// one differs. With D = F - S = sum (f - e), of which nothing cancels but what is alike,
//   p - t = (e - f) / F + e D / (S F) where F >= S, else (e - f) / S + f D / (S F)
struct SoftmaxDistance : MultirowLoss {
  static constexpr ItemTarget kTarget = ItemTarget::index;
  static constexpr int kInputs = 2, kGradients = 2, kMaxima = 2, kKept = 2, kLevels = 2, kSums = 3,
                       kSecondSums = 2, kScaleParameter = 0;
  enum { kSumX, kSumY, kDifference };  // S, F, F - S
  enum {
    kMaxX,
    kMaxY,
    kScale,
    kOverS,
    kOverF,
    kOverLarger,
    kShareX,
    kShareY,
    kFactorX,
    kFactorY,
    kOwn,
    kOwnConstants
  };
  MBK_FN static double inverse_temperature(const MultirowArgs& a) { return a.parameters[0]; }
  MBK_FN static void begin(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kMaxX] = item.max[0], c.value[kMaxY] = item.max[1];
    c.value[kScale] = inverse_temperature(a);
  }
  MBK_FN static void between(const MultirowArgs&, const MultirowItem& item, Constants& c) {
    const double S = item.first[kSumX], F = item.first[kSumY];
    const double share = item.first[kDifference] / (S * F);
    c.value[kOverS] = 1 / S, c.value[kOverF] = 1 / F;
    c.value[kOverLarger] = F >= S ? c.value[kOverF] : c.value[kOverS];
    c.value[kShareX] = F >= S ? share : 0, c.value[kShareY] = F >= S ? 0 : share;
  }
  template <class V, class C>
  MBK_FN static V difference(const C& c, const V* kept) {  // p - t
    const V shared =
        multiply_add(kept[0], constant<V>(c, kShareX), kept[1] * constant<V>(c, kShareY));
    return multiply_add(kept[0] - kept[1], constant<V>(c, kOverLarger), shared);
  }
  // log(1 + r) of a ratio whose r = ratio - 1 is known better, where it is small.
  MBK_FN static double log_near_one(double r, double ratio) {
    return r > -0.5 && r < 0.5 ? log1p(r) : log(ratio);
  }
  template <class V>
  MBK_FN static auto at_both_maxima(const V* kept) {
    return (kept[0] == splat<V>(1)) & (kept[1] == splat<V>(1));
  }
  template <class V, class C>
  MBK_FN static V distance_x(const C& c, const V* x) {
    return (x[0] - constant<V>(c, kMaxX)) * constant<V>(c, kScale);
  }
  template <class V, class C>
  MBK_FN static V distance_y(const C& c, const V* x) {
    return (x[1] - constant<V>(c, kMaxY)) * constant<V>(c, kScale);
  }
  template <class V, class C>
  MBK_FN static void keep(const C& c, const V* x, V* kept) {
    kept[0] = exp_nonpositive(distance_x(c, x));
    kept[1] = exp_nonpositive(distance_y(c, x));
  }
  template <class V, class C>
  MBK_FN static void sums1(const C&, const V*, V, const V* kept, V* term) {
    term[kSumX] = kept[0], term[kSumY] = kept[1], term[kDifference] = kept[1] - kept[0];
  }
};

// Forward: loss = c sum t (log t - log p), reverse (parameters[1] = 1): p and t change places, c is
// parameters[2]. With u = log t - log p every term can be made t (u - 1 + exp(-u)) >= 0, as
// sum p - t = 0; near u = 0 it is t u^2 P(u), where an error of u counts u times as much.
//   dloss/dx = c s (p - t),  dloss/dy = c s t (u - loss / c)
struct KlDivWithLogits : SoftmaxDistance {
  static constexpr const char* name = "kl_div_with_logits";
  static constexpr int kFusedLevel = 2, kConstants = kOwnConstants + 4;
  enum { kFromX = kOwnConstants, kFromY, kLogRatio, kTopY };
  MBK_FN static void prepare(MultirowArgs& a) {
    if (a.parameters[1] == 0) return;
    const RowTensor input = a.inputs[0], grad = a.grads[0];
    a.inputs[0] = a.inputs[1], a.grads[0] = a.grads[1];
    a.inputs[1] = input, a.grads[1] = grad;
  }
  MBK_FN static bool can_fuse(const MultirowArgs& a) { return !a.grads[1].data; }
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    return a.parameters[2] * item.second[0];
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const double f = a.parameters[2] * inverse_temperature(a) * item.scale;
    c.value[kFactorX] = f, c.value[kFactorY] = f / item.first[kSumY];
    c.value[kOwn] = item.second[0];
    c.value[kTopY] = c.value[kFactorY] * (log_sums(item) - item.second[0]);
    return 0;
  }
  // u = s (y - x) + what all columns share: y - x is exact where they are near each other. Where
  // the maxima are not, most of y - x may be an offset of one side, which takes no part: it would
  // take the last places of u with it, so each side is counted from its own maximum.
  MBK_FN static void between(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    SoftmaxDistance::between(a, item, c);
    const double apart = (item.max[1] - item.max[0]) * inverse_temperature(a);
    const bool near = apart >= -1 && apart <= 1;
    c.value[kFromX] = near ? 0 : item.max[0], c.value[kFromY] = near ? 0 : item.max[1];
    c.value[kLogRatio] = log_sums(item) - (near ? apart : 0);
  }
  MBK_FN static double log_sums(const MultirowItem& item) {  // log (S / F)
    return log_near_one(-item.first[kDifference] / item.first[kSumY],
                        item.first[kSumX] / item.first[kSumY]);
  }
  template <class V, class C>
  MBK_FN static V log_ratio(const C& c, const V* x) {
    const V difference = (x[1] - constant<V>(c, kFromY)) - (x[0] - constant<V>(c, kFromX));
    return multiply_add(difference, constant<V>(c, kScale), constant<V>(c, kLogRatio));
  }
  // (u - 1 + exp(-u)) / u^2 = sum (-u)^k / (k + 2)! for |u| < 1/2, to the last place.
  template <class V, F32<V> = 0>
  MBK_FN static V near_zero(V u) {
    return horner(-u, splat<V>(0x1.71de3ap-19f), 0x1.a01a02p-16f, 0x1.a01a02p-13f, 0x1.6c16c2p-10f,
                  0x1.111112p-7f, 0x1.555556p-5f, 0x1.555556p-3f, 0.5f);
  }
  template <class V, F64<V> = 0>
  MBK_FN static V near_zero(V u) {
    return horner(-u, splat<V>(1 / 1307674368000.0), 1 / 87178291200.0, 1 / 6227020800.0,
                  1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                  1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5);
  }
  template <class V, class C>
  MBK_FN static void sums2(const C& c, const V* x, V, const V* kept, V* term) {
    const V p = kept[0] * constant<V>(c, kOverS), t = kept[1] * constant<V>(c, kOverF);
    const V u = log_ratio(c, x);
    const V near = (t * (u * u)) * near_zero(u);
    const V far = multiply_add(t, u - splat<V>(1), p);
    term[0] = select(kept[1] == V{}, p, select(abs(u) < splat<V>((Element<V>)0.5), near, far));
    term[1] = V{};
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V, const V* kept, V* g) {
    const V t = kept[1] * constant<V>(c, kFactorY);
    const V by_teacher = select(kept[1] == V{}, V{}, t * (log_ratio(c, x) - constant<V>(c, kOwn)));
    g[0] = difference(c, kept) * constant<V>(c, kFactorX);
    // At both maxima u is log(S / F), without the rounding of y - x.
    g[1] = select(at_both_maxima(kept), constant<V>(c, kTopY), by_teacher);
  }
};

// loss = c (beta KL(t | m) + (1 - beta) KL(p | m)), m = beta t + (1 - beta) p, c = parameters[2].
// With t = m (1 + r), r = (1 - beta) (t - p) / m, a term is m ((1 + r) log(1 + r) - r) >= 0, as
// sum t - m = 0; the same for p, where r = -beta (t - p) / m.
//   dloss/dy = c s beta t (log(t / m) - KL(t | m)),  dloss/dx = c s (1 - beta) p (log(p / m) - ...)
struct JsDivWithLogits : SoftmaxDistance {
  static constexpr const char* name = "js_div_with_logits";
  static constexpr int kConstants = kOwnConstants + 2;
  enum { kOwnX = kOwn, kOwnY = kOwnConstants, kBeta };
  MBK_FN static void between(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    SoftmaxDistance::between(a, item, c);
    c.value[kBeta] = a.parameters[1];
  }
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    const double beta = a.parameters[1];
    return a.parameters[2] * (beta * item.second[1] + (1 - beta) * item.second[0]);
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const double f = a.parameters[2] * inverse_temperature(a) * item.scale;
    const double beta = a.parameters[1];
    c.value[kFactorX] = f * (1 - beta), c.value[kFactorY] = f * beta;
    c.value[kOwnX] = item.second[0], c.value[kOwnY] = item.second[1];
    return 0;
  }
  template <class V>
  struct Mixture {
    V p, t, m, x, y;  // x and y: the r of p and of t
  };
  template <class V, class C>
  MBK_FN static Mixture<V> mixture(const C& c, const V* kept) {
    Mixture<V> r;
    const V beta = constant<V>(c, kBeta), one = splat<V>(1);
    r.p = kept[0] * constant<V>(c, kOverS), r.t = kept[1] * constant<V>(c, kOverF);
    r.m = beta * r.t + (one - beta) * r.p;
    // Far from each other, p and t must agree with their difference: 1 + r is p / m.
    const V apart = r.p - r.t;
    const auto near = abs(apart) < splat<V>((Element<V>)0.25) * (r.p + r.t);
    const V d = select(r.m == V{}, V{}, select(near, difference(c, kept), apart) / r.m);
    r.x = beta * d, r.y = (beta - one) * d;
    return r;
  }
  // (1 + r) log(1 + r) - r, r >= -1. With r = 2 z / (1 - z) near 0 it is
  // 2 z^2 (1 + (1 + z) z (1/3 + z^2/5 + z^4/7 + ...)) / (1 - z).
  template <class V>
  MBK_FN static V excess(V r) {
    const V one = splat<V>(1), z = r / (r + splat<V>(2)), q = z * z;
    V P;
    if constexpr (sizeof(Element<V>) == 4) {
      P = horner(q, splat<V>(1 / 15.0f), 1 / 13.0f, 1 / 11.0f, 1 / 9.0f, 1 / 7.0f, 1 / 5.0f,
                 1 / 3.0f);
    } else {
      P = horner(q, splat<V>(1 / 35.0), 1 / 33.0, 1 / 31.0, 1 / 29.0, 1 / 27.0, 1 / 25.0, 1 / 23.0,
                 1 / 21.0, 1 / 19.0, 1 / 17.0, 1 / 15.0, 1 / 13.0, 1 / 11.0, 1 / 9.0, 1 / 7.0,
                 1 / 5.0, 1 / 3.0);
    }
    const V near = (q + q) * multiply_add((one + z) * z, P, one) / (one - z);
    const V far = (one + r) * log1p(r) - r;
    const V edge = select(r > -one, far, one);  // 0 log 0 = 0
    return select(abs(r) < splat<V>((Element<V>)0.5), near, edge);
  }
  template <class V, class C>
  MBK_FN static void sums2(const C& c, const V*, V, const V* kept, V* term) {
    const Mixture<V> r = mixture(c, kept);
    term[0] = r.m * excess(r.x);
    term[1] = r.m * excess(r.y);
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V*, V, const V* kept, V* g) {
    const Mixture<V> r = mixture(c, kept);
    const V zero = V{}, x = constant<V>(c, kFactorX) * r.p, y = constant<V>(c, kFactorY) * r.t;
    g[0] = select(r.p == zero, zero, x * (log_ratio(r.x, r.p, r.m) - constant<V>(c, kOwnX)));
    g[1] = select(r.t == zero, zero, y * (log_ratio(r.y, r.t, r.m) - constant<V>(c, kOwnY)));
  }
  // log(p / m) = log(1 + r): of the quotient where r is far from 0, as there 1 + r may round to 0.
  template <class V>
  MBK_FN static V log_ratio(V r, V p, V m) {
    const auto near = abs(r) < splat<V>((Element<V>)0.5);
    return select(near, log1p(r), log(p / m));
  }
};

// loss = c/2 sum |p - t|, c = parameters[2]. With sigma = sign(p - t), 0 where they are equal:
//   dloss/dx = c/2 s p (sigma - sum p sigma),  dloss/dy = -c/2 s t (sigma - sum t sigma)
// As sum p = 1, the bracket is A = sum p (1 - sigma) where sigma is 1, -B = -sum p (1 + sigma)
// where it is -1, and (A - B) / 2 where it is 0: no small difference where one sign has nearly all
// of p.
struct TvDistanceWithLogits : SoftmaxDistance {
  static constexpr const char* name = "tv_distance_with_logits";
  static constexpr int kSecondSums = 5, kConstants = kOwnConstants + 3;
  enum { kAboveX = kOwn, kBelowX, kAboveY, kBelowY };  // A and B, of p and of t
  MBK_FN static double loss(const MultirowArgs& a, const MultirowItem& item) {
    return a.parameters[2] * 0.5 * item.second[0];
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kFactorX] = a.parameters[2] * 0.5 * inverse_temperature(a) * item.scale;
    c.value[kFactorY] = -c.value[kFactorX];
    for (int k = 0; k < 4; ++k) c.value[kAboveX + k] = item.second[1 + k];
    return 0;
  }
  template <class V, class C>
  MBK_FN static void sums2(const C& c, const V*, V, const V* kept, V* term) {
    const V p = kept[0] * constant<V>(c, kOverS), t = kept[1] * constant<V>(c, kOverF),
            d = difference(c, kept), zero = V{};
    const auto above = d > zero, below = d < zero;
    term[0] = abs(d);
    term[1] = select(above, zero, select(below, p + p, p));
    term[2] = select(below, zero, select(above, p + p, p));
    term[3] = select(above, zero, select(below, t + t, t));
    term[4] = select(below, zero, select(above, t + t, t));
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V*, V, const V* kept, V* g) {
    const V p = kept[0] * constant<V>(c, kOverS), t = kept[1] * constant<V>(c, kOverF),
            d = difference(c, kept), zero = V{};
    const auto above = d > zero, below = d < zero;
    const auto bracket = [&](int first) {
      const V a = constant<V>(c, first), b = constant<V>(c, first + 1);
      return select(above, a, select(below, -b, (a - b) * splat<V>((Element<V>)0.5)));
    };
    g[0] = p * constant<V>(c, kFactorX) * bracket(kAboveX);
    g[1] = t * constant<V>(c, kFactorY) * bracket(kAboveY);
  }
};

// loss = -sum p log p = log S + Q / S, Q = sum e (-a) over the row. Columns at the maximum, of
// which there are n, are counted instead of added, so that log S = log1p((n - 1) + R) has all of
// the small rest R of a confident row.  dloss/dx = -s p (a + Q / S)
struct EntropyWithLogits : MultirowLoss {
  static constexpr const char* name = "entropy_with_logits";
  static constexpr ItemTarget kTarget = ItemTarget::index;
  static constexpr int kMaxima = 1, kKept = 1, kSums = 3, kScaleParameter = 0, kConstants = 4;
  enum { kMax, kScale, kFactor, kOwn };
  MBK_FN static void begin(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    c.value[kMax] = item.max[0], c.value[kScale] = a.parameters[0];
  }
  MBK_FN static double excess(const MultirowItem& item) {  // S - 1
    return (item.first[1] - 1) + item.first[0];
  }
  MBK_FN static double loss(const MultirowArgs&, const MultirowItem& item) {
    const double rest = excess(item);
    return log1p(rest) + item.first[2] / (1 + rest);
  }
  MBK_FN static double factors(const MultirowArgs& a, const MultirowItem& item, Constants& c) {
    const double sum = 1 + excess(item);
    c.value[kFactor] = -(a.parameters[0] * item.scale / sum);
    c.value[kOwn] = item.first[2] / sum;
    return 0;
  }
  template <class V, class C>
  MBK_FN static V distance(const C& c, const V* x) {
    return (x[0] - constant<V>(c, kMax)) * constant<V>(c, kScale);
  }
  template <class V, class C>
  MBK_FN static void keep(const C& c, const V* x, V* kept) {
    kept[0] = exp_nonpositive(distance(c, x));
  }
  template <class V, class C>
  MBK_FN static void sums1(const C& c, const V* x, V, const V* kept, V* term) {
    const V a = distance(c, x), zero = V{};
    const auto top = a == zero;
    term[0] = select(top, zero, kept[0]);
    term[1] = select(top, splat<V>(1), zero);
    term[2] = select(kept[0] == zero, zero, -(kept[0] * a));
  }
  template <class V, class C>
  MBK_FN static void gradient(const C& c, const V* x, V, const V* kept, V* g) {
    const V own = distance(c, x) + constant<V>(c, kOwn);
    g[0] = select(kept[0] == V{}, V{}, kept[0] * constant<V>(c, kFactor) * own);
  }
};

}  // namespace mbk::MBK_ISA
