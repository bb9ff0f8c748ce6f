#pragma once
// The arithmetic of accumulation and flush, for every lane type.
#include "core/dtype.h"
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
  // p is 0 or NaN where it is neither positive nor negative.
  template <class V>
  MBK_FN V regularised(V buffer, V p, T l1, T l2) const {
    const V one = splat<V>((Element<V>)1);
    const V sign = select(p > V{}, one, select(p < V{}, -one, p));
    const V penalty = multiply_add(splat<V>(l2), p, splat<V>(l1) * sign);
    return multiply_add(splat<V>(scale), buffer, penalty);
  }
  template <class V>
  MBK_FN V clipped(V v) const {
    return canonical(splat<V>(clip) * v);
  }
};

// The penalty of an element, from its value in double.
template <class D>
MBK_FN D penalty_of(D p, double l1, double l2) {
  return splat<D>(l1) * abs(p) + splat<D>(l2 / 2) * (p * p);
}

}  // namespace mbk::MBK_ISA
