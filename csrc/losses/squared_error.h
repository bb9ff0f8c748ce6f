#pragma once
#include "core/lane.h"

namespace mbk::MBK_ISA {

// loss = d^2 / 2, dloss/dinput = d, dloss/dtarget = -d, with d = input - target. No parameter.
struct HalfSquaredError {
  static constexpr const char* name = "half_squared_error";
  template <class V>
  MBK_FN static void eval(V input, V target, Element<V>, V& loss, V& dinput, V& dtarget) {
    const V d = input - target;
    loss = d * d * (Element<V>)0.5;
    dinput = d;
    dtarget = -d;
  }
};

// loss = d^2, dloss/dinput = 2 d, dloss/dtarget = -2 d, with d = input - target. No parameter.
struct SquaredError {
  static constexpr const char* name = "mse_loss";
  template <class V>
  MBK_FN static void eval(V input, V target, Element<V>, V& loss, V& dinput, V& dtarget) {
    const V d = input - target;
    loss = d * d;
    dinput = d + d;
    dtarget = -dinput;
  }
};

}  // namespace mbk::MBK_ISA
