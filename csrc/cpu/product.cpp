// C (+)= A^T B into fp32 (fp64), the product that no library has on the CPU: 16-bit operands, added
// in place to a buffer of full precision, and each element one chain of fused multiply-adds that
// starts from the buffer. A chain can be cut anywhere and continued, so the sum over samples has
// the same bits for every cut of the batch, every thread count and every instruction set.
//
// As in BLIS (Van Zee & van de Geijn 2015), operands are packed into the order in which they are
// used, widened on the way, and a tile of C is held in registers while the depth runs by.
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

// ---- a tile of C in registers -------------------------------------------------------------------

#if MBK_SIMD && defined(__AVX512F__)
inline constexpr int kTileRows = 12, kTileVectors = 2;  // 24 of 32 registers
#elif MBK_SIMD
inline constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#else
inline constexpr int kTileRows = 4, kTileVectors = 4;
#endif

template <class T>
inline constexpr int kTileColumns = kTileVectors * lanes<Vector<T>>;

// Where a tile starts from, and what becomes of it.
template <class T>
struct TilePlace {
  T* c;
  int64_t stride;
  const T* start;  // null: 0
  int64_t start_stride;
  bool add;  // to c, in place of c
};

template <class T>
struct Accumulators {
  typedef Vector<T> V;
  V v[kTileRows][kTileVectors];

  MBK_FN explicit Accumulators(const TilePlace<T>& p) {
    if (p.start) {
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < kTileVectors; ++j)
          v[i][j] = load<V>(p.start + i * p.start_stride + j * lanes<V>);
    } else {
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < kTileVectors; ++j) {
          v[i][j] = V{};
          __builtin_prefetch(p.c + i * p.stride + j * lanes<V>, 1);
        }
    }
  }
  MBK_FN void finish(const TilePlace<T>& p) const {
    if (p.add) {
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < kTileVectors; ++j) {
          T* const place = p.c + i * p.stride + j * lanes<V>;
          store(place, canonical(load<V>(place) + v[i][j]));
        }
    } else {
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < kTileVectors; ++j)
          store(p.c + i * p.stride + j * lanes<V>, canonical(v[i][j]));
    }
  }
};

// a: depth x kTileRows, b: depth x kTileColumns, packed.
template <class T>
MBK_PASS void chain_tile(const void* packed_a, const void* packed_b, int64_t depth,
                         const TilePlace<T>& place) {
  typedef Vector<T> V;
  const T *a = (const T*)packed_a, *b = (const T*)packed_b;
  Accumulators<T> sum(place);
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileColumns<T>) {
    V column[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j) column[j] = load<V>(b + j * lanes<V>);
    for (int i = 0; i < kTileRows; ++i) {
      const V row = splat<V>(a[i]);
      for (int j = 0; j < kTileVectors; ++j)
        sum.v[i][j] = multiply_add(row, column[j], sum.v[i][j]);
    }
  }
  sum.finish(place);
}

// ---- bf16 in pairs ------------------------------------------------------------------------------

#if MBK_SIMD && defined(__AVX512F__)
#define MBK_PAIRS 1

MBK_PASS double largest_of_pairs(const void* packed, int64_t n) {
  const uint32_t* const pairs = (const uint32_t*)packed;
  uint32_t low = 0, high = 0;
  for (int64_t k = 0; k < n; ++k) {
    const uint32_t first = pairs[k] << 17, second = pairs[k] << 1 & 0xfffe0000u;
    low = first > low ? first : low;
    high = second > high ? second : high;
  }
  return (double)as_float((int32_t)((low > high ? low : high) >> 1));
}

__attribute__((target("avx512bf16"))) MBK_PASS void pair_tile(const void* packed_a,
                                                              const void* packed_b, int64_t depth,
                                                              const TilePlace<float>& place) {
  const int32_t *a = (const int32_t*)packed_a, *b = (const int32_t*)packed_b;
  Accumulators<float> sum(place);
  for (int64_t k = 0; k < depth; k += 2, a += kTileRows, b += kTileColumns<float>) {
    __m512bh column[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j) column[j] = (__m512bh)_mm512_loadu_si512(b + j * 16);
    for (int i = 0; i < kTileRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(a[i]);
      for (int j = 0; j < kTileVectors; ++j)
        sum.v[i][j] = (f32v)_mm512_dpbf16_ps((__m512)sum.v[i][j], row, column[j]);
    }
  }
  sum.finish(place);
}
#endif

// ---- a part of C --------------------------------------------------------------------------------

template <class T>
struct Way {
  Pack pack_a, pack_b;
  void (*tile)(const void* a, const void* b, int64_t depth, const TilePlace<T>& place);
  int64_t element_bytes, element_depth;  // of what is packed
  double (*largest)(const void* packed, int64_t n);
};

// The largest magnitude; NaN counts as larger than all.
template <class T>
MBK_PASS double largest(const void* packed, int64_t n) {
  typedef typename Pick<sizeof(T) == 4, uint32_t, uint64_t>::type Word;
  const Word* const words = (const Word*)packed;
  Word top = 0;
  for (int64_t k = 0; k < n; ++k) {
    const Word magnitude = words[k] << 1 >> 1;
    top = magnitude > top ? magnitude : top;
  }
  T x;
  memcpy(&x, &top, sizeof x);
  return (double)x;
}

// The depth that is packed at once. A chain may be cut anywhere; longer runs go over C less often.
constexpr int64_t kChainDepth = 512;
constexpr int64_t kBytesOfB = 1 << 20;
static_assert(kBytesOfB + kChainDepth * kTileRows * 8 + 64 <= kProductScratch,
              "a strip of A fits, and a vector that hangs over");

template <class T>
struct Part {
  const ProductArgs& p;
  const Way<T>& way;
  char *panel, *strip;
  int64_t rows_begin, rows_end;

  bool blocks() const { return p.order == ProductOrder::blocks; }

  MBK_FN void tile(const char* b, int64_t depth, int64_t i, int64_t j, bool first) const {
    T* const c = (T*)p.c + i * p.c_stride + j;
    TilePlace<T> place{c, p.c_stride, blocks() ? nullptr : c, p.c_stride, blocks()};
    if (first && p.from_zero) place.start = nullptr;
    const int64_t rows = smaller(kTileRows, rows_end - i);
    const int64_t columns = smaller(kTileColumns<T>, p.columns - j);
    if (rows == kTileRows && columns == kTileColumns<T>) return way.tile(strip, b, depth, place);
    edge_tile(b, depth, place, rows, columns);
  }
  // A tile that hangs over the edge of C goes by way of a whole one.
  MBK_RARE void edge_tile(const char* b, int64_t depth, const TilePlace<T>& place, int64_t rows,
                          int64_t columns) const {
    constexpr int64_t kColumns = kTileColumns<T>;
    T whole[kTileRows * kColumns] = {};
    const T* const from = place.add ? place.c : place.start;
    const int64_t stride = place.add ? place.stride : place.start_stride;
    for (int64_t r = 0; from && r < rows; ++r)
      for (int64_t s = 0; s < columns; ++s) whole[r * kColumns + s] = from[r * stride + s];
    way.tile(strip, b, depth, {whole, kColumns, place.add ? nullptr : whole, kColumns, place.add});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < columns; ++s) place.c[r * place.stride + s] = whole[r * kColumns + s];
  }

  MBK_RARE void clear(int64_t j, int64_t columns) const {
    for (int64_t i = rows_begin; i < rows_end; ++i)
      for (int64_t s = j; s < j + columns; ++s) ((T*)p.c)[i * p.c_stride + s] = 0;
  }

  // Whether the strip can be left out: C has been started, and takes nothing that is not small.
  MBK_RARE bool is_small(int64_t packed, bool first) const {
    if (first && p.from_zero && !blocks()) return false;
    return way.largest(strip, packed / way.element_bytes * kTileRows) < p.skip_below;
  }

  // Columns [j, j + columns), at most a panel.
  MBK_FN void run(int64_t j, int64_t columns) const {
    if (p.from_zero && (blocks() || !p.depth)) clear(j, columns);
    const int64_t step = blocks() ? kProductBlock : kChainDepth;
    for (int64_t k = 0; k < p.depth; k += step) {
      const int64_t depth = smaller(step, p.depth - k);
      const int64_t packed =
          (depth + way.element_depth - 1) / way.element_depth * way.element_bytes;
      for (int64_t s = 0; s < columns; s += kTileColumns<T>)
        way.pack_b(panel + s * packed, p.b, k, j + s, depth, columns - s);
      for (int64_t i = rows_begin; i < rows_end; i += kTileRows) {
        way.pack_a(strip, p.a, k, i, depth, rows_end - i);
        if (p.skip_below > 0 && is_small(packed, k == 0)) continue;
        for (int64_t s = 0; s < columns; s += kTileColumns<T>)
          tile(panel + s * packed, depth, i, j + s, k == 0);
      }
    }
  }
};

constexpr int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How many panels of columns C is cut into, each at most what is packed at once, and how many parts
// of rows those: enough that all threads have work and end together, yet with rows to use a panel
// for, and columns to use a strip for, as long as there are any.
struct Cut {
  int64_t panels, parts, columns, rows;  // columns and rows of one, in whole tiles

  MBK_FN Cut(const ProductArgs& p, int64_t most_columns, int64_t tile_columns) {
    constexpr int64_t kGoodRows = 16 * kTileRows, kFewRows = 4 * kTileRows, kPartsOfThread = 4;
    const int64_t threads = p.threads, few_columns = 4 * tile_columns;
    panels = parts_of(p.columns, most_columns), parts = 1;
    if (threads > 1) {
      parts = cut(p.rows, kGoodRows, parts_of(threads * kPartsOfThread, panels));
      if (parts * panels < threads)
        panels = larger(panels, cut(p.columns, few_columns, parts_of(threads, parts)));
      if (parts * panels < threads) parts = cut(p.rows, kFewRows, parts_of(threads, panels));
      const int64_t even = threads / divisor(threads, panels);
      if (parts >= even) parts = parts / even * even;
    }
    columns = parts_of(parts_of(p.columns, panels), tile_columns) * tile_columns;
    rows = parts_of(parts_of(p.rows, parts), kTileRows) * kTileRows;
    panels = parts_of(p.columns, columns), parts = parts_of(p.rows, rows);
  }

 private:
  // At most `wanted` pieces, each of at least `least` if there is more than one.
  static int64_t cut(int64_t whole, int64_t least, int64_t wanted) {
    return larger(smaller(whole / least, wanted), 1);
  }
  static int64_t divisor(int64_t a, int64_t b) { return b ? divisor(b, a % b) : a; }
};

template <class T>
MBK_PASS void product(const ProductArgs& p, const Way<T>& way) {
  if (!p.rows || !p.columns) return;
  const int64_t bytes = kChainDepth * way.element_bytes / way.element_depth;
  const Cut cut(p, kBytesOfB / bytes / kTileColumns<T> * kTileColumns<T>, kTileColumns<T>);
  auto body = [&p, &way, &cut](int64_t begin, int64_t end, int thread) {
    char* const scratch = p.scratch + thread * kProductScratch;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k % cut.parts * cut.rows, j = k / cut.parts * cut.columns;
      const Part<T> part{p, way, scratch, scratch + kBytesOfB, i, smaller(p.rows, i + cut.rows)};
      part.run(j, smaller(cut.columns, p.columns - j));
    }
  };
  parallel_for(cut.parts * cut.panels, 1, p.threads, body);
}

}  // namespace

// False where there is no such product: fp64 goes with fp64 only.
bool run_product(const ProductArgs& p) {
  if (p.order == ProductOrder::pairs) {
#if MBK_PAIRS
    if (p.a.dtype != DType::bf16 || p.b.dtype != DType::bf16) return false;
    const Way<float> way{&pack_pairs<kTileRows>, &pack_pairs<kTileColumns<float>>, &pair_tile, 4, 2,
                         &largest_of_pairs};
    product(p, way);
    return true;
#else
    return false;
#endif
  }
  if (p.a.dtype == DType::f64 || p.b.dtype == DType::f64) {
    if (p.a.dtype != p.b.dtype) return false;
    const Way<double> way{
        &pack<kTileRows, double>, &pack<kTileColumns<double>, double>, &chain_tile<double>, 8, 1,
        &largest<double>};
    product(p, way);
    return true;
  }
  const Way<float> way{find_pack<kTileRows>(p.a.dtype),
                       find_pack<kTileColumns<float>>(p.b.dtype),
                       &chain_tile<float>,
                       4,
                       1,
                       &largest<float>};
  product(p, way);
  return true;
}

}  // namespace mbk::MBK_ISA
