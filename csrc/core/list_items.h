#pragma once
// The arithmetic of accumulation and flush, for every lane type.
#include "core/dtype.h"
#include "core/random.h"
#include "core/tensor_list.h"

namespace mbk::MBK_ISA {

template <class T>
struct Accumulation {
  T alpha, beta;
  bool reads;  // the buffer

  MBK_FN explicit Accumulation(const AccumulateArgs& a)
      : alpha((T)read(a.alpha)), beta((T)read(a.beta)), reads(beta != 0) {}
  template <class V>
  MBK_FN V of(V buffer, V grad) const {
    return canonical(multiply_add(splat<V>(alpha), grad, splat<V>(beta) * buffer));
  }
  template <class V>
  MBK_FN V of(V grad) const {
    return canonical(splat<V>(alpha) * grad);
  }
};

// x, a float that is not a NaN of its own making, to the nearest of bf16.
template <class V>
MBK_FN V nearest_bf16(V x) {
  const Int<V> u = as_int(x);
  return as_float((u + 0x7fff + ((u >> 16) & 1)) & -0x10000);
}

// Sums in bf16 buffers, whose 8 bits alone would lose what is added to them. Numbers are floats
// that bf16 holds.
struct Bf16Accumulation {
  Accumulation<float> item;

  // The sum is a pair buffer + low: Kahan's compensation. The new low part is what the buffer
  // cannot hold; 16 bits in all. An infinite sum has none.
  template <class V>
  MBK_FN void paired(V& buffer, V& low, V grad) const {
    const V sum = item.reads ? item.of(buffer + low, grad) : item.of(grad);
    buffer = nearest_bf16(sum);
    low = select(abs(buffer) < splat<V>(__builtin_inff()), nearest_bf16(sum - buffer), V{});
  }
  // Rounded up as often as its distance says: right on average. `random` has 16 bits below.
  template <class V>
  MBK_FN V by_chance(V buffer, V grad, Int<V> random) const {
    const V sum = item.reads ? item.of(buffer, grad) : item.of(grad);
    return as_float((as_int(sum) + random) & -0x10000);
  }
};

template <class T>
struct Flush {
  T scale, clip;

  MBK_FN explicit Flush(const FlushArgs& a) : scale(0), clip(a.clip ? (T)*a.clip : (T)1) {
    const double denominator = read(a.denominator);
    if (denominator != 0) scale = (T)(read(a.factor) / (denominator * read(a.grad_scale)));
  }
  template <class V>
  MBK_FN V scaled(V buffer) const {
    return splat<V>(scale) * buffer;
  }
  // p is 0 or NaN where it is neither positive nor negative. Without l1 its term would add a zero
  // of the sign of p, which changes no sum.
  template <bool kL1, class V>
  MBK_FN V regularised(V buffer, V p, T l1, T l2) const {
    V penalty = splat<V>(l2) * p;
    if constexpr (kL1) {
      const V one = splat<V>((Element<V>)1);
      const V sign = select(p > V{}, one, select(p < V{}, -one, p));
      penalty = multiply_add(splat<V>(l2), p, splat<V>(l1) * sign);
    }
    return multiply_add(splat<V>(scale), buffer, penalty);
  }
  template <class V>
  MBK_FN V clipped(V v) const {
    return canonical(splat<V>(clip) * v);
  }
};

// sum + the square of a number that is computed in T.
template <class T, class D>
MBK_FN D plus_square(D sum, D x) {
  if constexpr (sizeof(T) == 4) {
    return add_square(sum, x);
  } else {
    return sum + x * x;
  }
}

// The penalty of a block: of each element p^2, times l2 / 2 in the end, where there is no l1; else
// l1 |p| + l2 / 2 p^2.
template <class D>
MBK_FN D penalty_of(D p, double l1, double l2) {
  return splat<D>(l1) * abs(p) + splat<D>(l2 / 2) * (p * p);
}
MBK_FN double block_penalty(double sum, double l1, double l2) {
  return l1 == 0 ? l2 / 2 * sum : sum;
}

}  // namespace mbk::MBK_ISA
