// Products with a fixed order of summation: against a chain of fma by hand, and the same bits on
// every tier, for every thread count and cut, and by the CUDA kernel where it is built.
#include "check.h"
#include "core/product_args.h"
#include "cpu/dispatch.h"
#if defined(MBKERN_CUDA)
#include "cuda/calls.h"
#endif

namespace test {
namespace {

using mbk::DType;
using mbk::ProductOrder;

struct Shape {
  int64_t depth, rows, columns;
};

// Rows of a storage type, multiples of 1/64, which all of them hold exactly.
struct Matrix {
  Buffer buffer;
  int64_t columns;

  Matrix(DType type, int64_t rows, int64_t n, uint64_t seed) : buffer(type, rows * n), columns(n) {
    Random random{seed};
    for (int64_t i = 0; i < rows * n; ++i) buffer.set(i, (double)(random.below(128) - 64) / 64);
  }
  double get(int64_t row, int64_t column) const { return buffer.get(row * columns + column); }
  const void* from(int64_t element) const {
    return (const char*)buffer.data() + element * size_of(buffer.type());
  }
};

template <class T>
std::vector<T> by_hand(const Matrix& a, const Matrix& b, const std::vector<T>& start,
                       const Shape& s, ProductOrder order) {
  std::vector<T> c = start;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.columns; ++j) {
      T& element = c[(size_t)(i * s.columns + j)];
      T sum = order == ProductOrder::blocks ? (T)0 : element;
      for (int64_t k = 0; k < s.depth; ++k) {
        const T x = (T)a.get(k, i);
        const T y = (T)b.get(j, k);  // b is stored by columns
        sum = mbk::MBK_ISA::multiply_add(x, y, sum);
        if (order == ProductOrder::blocks &&
            ((k + 1) % mbk::kProductBlock == 0 || k + 1 == s.depth))
          element = element + sum, sum = 0;
      }
      if (order != ProductOrder::blocks) element = sum;
    }
  return c;
}

mbk::ProductArgs arguments(const Matrix& a, const Matrix& b, void* c, DType type, const Shape& s,
                           ProductOrder order, int threads, char* scratch) {
  mbk::ProductArgs p{};
  p.rows = s.rows, p.columns = s.columns, p.depth = s.depth;
  p.a = {a.from(0), a.buffer.type(), s.rows, 1};
  p.b = {b.from(0), b.buffer.type(), 1, s.depth};
  p.c = c, p.c_dtype = type, p.c_stride = s.columns;
  p.order = order, p.threads = threads, p.scratch = scratch;
  return p;
}

uint64_t word(float x) { return mbk::MBK_ISA::bits(x); }
uint64_t word(double x) { return mbk::MBK_ISA::bits(x); }

template <class T>
int64_t products(DType a_type, DType b_type, const Shape& s) {
  constexpr DType type = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const Matrix a(a_type, s.depth, s.rows, 3), b(b_type, s.columns, s.depth, 5);
  std::vector<T> start((size_t)(s.rows * s.columns));
  for (size_t i = 0; i < start.size(); ++i) start[i] = (T)((double)(i % 97) / 7);
  std::vector<char> memory(4 * mbk::kProductScratch + 64);
  char* const scratch = memory.data() + (64 - (uintptr_t)memory.data() % 64) % 64;
  const auto& tiers = mbk::available_backends();
  int64_t count = 0;
  for (const ProductOrder order : {ProductOrder::chain, ProductOrder::blocks}) {
    const std::vector<T> want = by_hand(a, b, start, s, order);
    for (size_t t = 0; t < tiers.size(); ++t)
      for (const int threads : {1, 3}) {
        std::vector<T> c = start;
        mbk::ProductArgs p = arguments(a, b, c.data(), type, s, order, threads, scratch);
        const bool done = tiers[t]->product(p);
        CHECK(done && c == want, "product %s: (%lld, %lld, %lld) of %s and %s, order %d",
              tiers[t]->name, (long long)s.depth, (long long)s.rows, (long long)s.columns,
              name_of(a_type), name_of(b_type), (int)order);
        if (threads == 1)
          for (const T x : c) digest_of(t).add(word(x));
        count += (int64_t)c.size();
        if (order != ProductOrder::chain || s.depth < 2) continue;
        // Cut at one third: the chain goes on from the buffer.
        c = start;
        const int64_t first = s.depth / 3;
        p.c = c.data(), p.depth = first;
        tiers[t]->product(p);
        p.a.data = a.from(first * s.rows), p.b.data = b.from(first);
        p.depth = s.depth - first;
        tiers[t]->product(p);
        CHECK(c == want, "product %s: cut at %lld", tiers[t]->name, (long long)first);
      }
#if defined(MBKERN_CUDA)
    std::vector<T> c = start;
    const bool done = mbk::cuda::run_product({nullptr, nullptr},
                                             arguments(a, b, c.data(), type, s, order, 1, nullptr));
    CHECK(done && c == want, "product cuda: (%lld, %lld, %lld), order %d", (long long)s.depth,
          (long long)s.rows, (long long)s.columns, (int)order);
#endif
  }
  return count;
}

}  // namespace

int64_t all_products(const Options& options) {
  constexpr Shape shapes[] = {{1, 1, 1},     {7, 13, 33}, {300, 5, 70}, {513, 25, 31},
                              {256, 12, 32}, {0, 3, 4},   {2, 200, 7}};
  constexpr DType narrow[] = {DType::f32, DType::bf16, DType::f16};
  int64_t count = 0;
  for (const Shape& s : shapes) {
    for (const DType a : narrow)
      for (const DType b : narrow)
        if (!options.quick || a == b) count += products<float>(a, b, s);
    count += products<double>(DType::f64, DType::f64, s);
  }
  return count;
}

}  // namespace test
