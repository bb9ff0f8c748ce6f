#pragma once
// What the groups of core_test share: a check, reproducible numbers, buffers of exactly the needed
// size, and a digest of the results. Nothing that reaches a kernel comes out of the C library, so
// that the digest is that of every compiler and every machine.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/dtype.h"

// CHECK(condition, "format", values...): counts, and prints the first few that fail.
#define CHECK(ok, ...)                                    \
  do {                                                    \
    if (!(ok) && test::failed(__FILE__, __LINE__, #ok)) { \
      fprintf(stderr, __VA_ARGS__), fputc('\n', stderr);  \
    }                                                     \
  } while (0)

namespace test {

inline constexpr int kPrinted = 20;
inline int failures = 0;

// Counts a failure; true if it is to be printed.
inline bool failed(const char* file, int line, const char* what) {
  if (++failures > kPrinted) return false;
  fprintf(stderr, "%s:%d: %s: ", file, line, what);
  return true;
}

struct Random {  // splitmix64 (Steele, Lea & Flood 2014)
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double uniform() { return (double)(next() >> 11) * 0x1p-53; }  // in [0, 1)
  double symmetric() { return 2 * uniform() - 1; }
  float any_float() {
    const uint32_t u = (uint32_t)next();
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
};

struct Digest {  // FNV-1a over 64-bit words
  uint64_t value = 0xcbf29ce484222325;
  void add(uint64_t word) { value = (value ^ word) * 0x100000001b3; }
  void add(const std::vector<uint64_t>& words) {
    for (const uint64_t w : words) add(w);
  }
};

inline int size_of(mbk::DType type) {
  return type == mbk::DType::f64 ? 8 : type == mbk::DType::f32 ? 4 : 2;
}
inline const char* name_of(mbk::DType type) {
  static constexpr const char* names[] = {"fp32", "bf16", "fp16", "fp64"};
  return names[(int)type];
}

// Elements on the heap, in exactly the memory they need, so that AddressSanitizer sees a step
// outside; poisoned, so that an element that is never written is seen as well.
class Buffer {
 public:
  Buffer(mbk::DType type, int64_t size)
      : type_(type), size_(size), memory_(new char[(size_t)(size * size_of(type))]) {
    memset(memory_.get(), 0xa5, (size_t)(size * size_of(type)));
  }
  void* data() const { return memory_.get(); }
  mbk::DType type() const { return type_; }
  int64_t size() const { return size_; }
  uint64_t bits(int64_t i) const {
    uint64_t u = 0;
    memcpy(&u, memory_.get() + i * size_of(type_), (size_t)size_of(type_));
    return u;
  }
  uint64_t poison() const { return 0xa5a5a5a5a5a5a5a5 >> (64 - 8 * size_of(type_)); }
  double get(int64_t i) const {
    namespace m = mbk::MBK_ISA;
    switch (type_) {
      case mbk::DType::f32:
        return ((const float*)data())[i];
      case mbk::DType::bf16:
        return m::widen(((const m::bf16*)data())[i]);
      case mbk::DType::f16:
        return m::widen(((const m::f16*)data())[i]);
      default:
        return ((const double*)data())[i];
    }
  }
  void set(int64_t i, double x) {
    namespace m = mbk::MBK_ISA;
    switch (type_) {
      case mbk::DType::f32:
        ((float*)data())[i] = (float)x;
        break;
      case mbk::DType::bf16:
        ((m::bf16*)data())[i] = m::narrow<m::bf16>(m::canonical((float)x));
        break;
      case mbk::DType::f16:
        ((m::f16*)data())[i] = m::narrow<m::f16>((float)x);
        break;
      default:
        ((double*)data())[i] = x;
    }
  }

 private:
  mbk::DType type_;
  int64_t size_;
  std::unique_ptr<char[]> memory_;
};

// The unit roundoff of a storage type, and half its smallest denormal number.
inline double roundoff(mbk::DType type) {
  static constexpr double values[] = {0x1p-24, 0x1p-8, 0x1p-11, 0x1p-53};
  return values[(int)type];
}
inline double half_denormal(mbk::DType type) {
  static constexpr double values[] = {0x1p-150, 0x1p-134, 0x1p-25, 0x1p-1074};
  return values[(int)type];
}
inline uint64_t nan_bits(mbk::DType type) {
  static constexpr uint64_t values[] = {0x7fc00000, 0x7fc0, 0x7e00, 0x7ff8000000000000};
  return values[(int)type];
}

struct Options {
  bool quick = false;
};

// Each group returns the number of things it has looked at.
int64_t numbers_fma(const Options&);
int64_t numbers_storage(const Options&);
int64_t numbers_exact_sum(const Options&);
int64_t numbers_sum_few(const Options&);
int64_t row_losses(const Options&);
int64_t row_threads(const Options&);
int64_t row_devices(const Options&);
int64_t row_refusals(const Options&);
int64_t pointwise_losses(const Options&);
int64_t usual_pointwise_losses(const Options&);
int64_t multirow_losses(const Options&);
int64_t all_products(const Options&);

// The digest of a tier's results, to which the groups add; by position in available_backends().
Digest& digest_of(size_t tier);

}  // namespace test
