#pragma once
// The floating-point environment of a kernel: round to nearest even, denormals kept, exceptions
// masked, whatever the caller (or a neighbour built with -ffast-math) has set; restored on leaving.
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mbk {

class DefaultEnvironment {
 public:
#if defined(__x86_64__)
  DefaultEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultEnvironment() { _mm_setcsr(saved_); }

 private:
  uint32_t saved_;
#elif defined(__aarch64__)
  DefaultEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
 public:
  DefaultEnvironment(const DefaultEnvironment&) = delete;
  DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;
};

}  // namespace mbk
