#include "cpu/arrays.h"

#include <type_traits>

#include "core/dtype.h"
#include "cpu/parallel.h"

namespace mbk {

using namespace mbk::MBK_ISA;

namespace {

// Calls f with a null pointer of the storage type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
  }
}

}  // namespace

void scale_array(void* x, DType dtype, int64_t n, double factor, int threads) {
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* const values = static_cast<S*>(x);
    const auto f = static_cast<Compute<S>>(factor);
    auto body = [=](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) values[i] = narrow<S>(canonical(widen(values[i]) * f));
    };
    parallel_for(n, kElementsPerTask, threads, body);
  });
}

void convert_array(const void* from, DType from_dtype, void* to, DType to_dtype, int64_t n,
                   int threads) {
  with_type(from_dtype, [&](auto* from_type) {
    with_type(to_dtype, [&](auto* to_type) {
      using From = std::remove_pointer_t<decltype(from_type)>;
      using To = std::remove_pointer_t<decltype(to_type)>;
      const From* const source = static_cast<const From*>(from);
      To* const target = static_cast<To*>(to);
      auto body = [=](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
          target[i] = narrow<To>(canonical(computed_as<To>(widen(source[i]))));
      };
      parallel_for(n, kElementsPerTask, threads, body);
    });
  });
}

}  // namespace mbk
