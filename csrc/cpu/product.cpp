// C (+)= A^T B into fp32 (fp64), the product that no library has on the CPU: 16-bit operands, added
// in place to a buffer of full precision, and each element one chain of fused multiply-adds that
// starts from the buffer. A chain can be cut anywhere and continued, so the sum over samples has
// the same bits for every cut of the batch, every thread count and every instruction set.
//
// As in BLIS (Van Zee & van de Geijn 2015), operands are packed into the order in which they are
// used, widened on the way, and a tile of C is held in registers while the depth runs by.
#include "core/dtype.h"
#include "core/product_args.h"
#include "cpu/parallel.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kTileVectors; ++j)
        v[i][j] = p.start ? load<V>(p.start + i * p.start_stride + j * lanes<V>) : V{};
  }
  MBK_FN void finish(const TilePlace<T>& p) const {
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kTileVectors; ++j) {
        T* const place = p.c + i * p.stride + j * lanes<V>;
        store(place, canonical(p.add ? load<V>(place) + v[i][j] : v[i][j]));
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

// ---- packing ------------------------------------------------------------------------------------

// to(k, i) = o(k, i), widened, for `depth` by kWidth elements from (first_k, first) on; 0 past
// `count`.
typedef void (*Pack)(void* to, const Operand& o, int64_t first_k, int64_t first, int64_t depth,
                     int64_t count);

template <class S>
MBK_FN const S* begin_of(const Operand& o, int64_t k, int64_t i) {
  return (const S*)o.data + k * o.depth_stride + i * o.stride;
}

template <int kWidth, class S>
MBK_PASS void pack(void* packed, const Operand& o, int64_t first_k, int64_t first, int64_t depth,
                   int64_t count) {
  typedef Compute<S> T;
  typedef Vector<T> V;
  const S* from = begin_of<S>(o, first_k, first);
  const int64_t down = o.depth_stride, across = o.stride;
  T* to = (T*)packed;
  if (count < kWidth) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < kWidth; ++i)
        to[k * kWidth + i] = i < count ? widen(from[k * down + i * across]) : (T)0;
  } else if (across == 1) {
    constexpr int kRest = kWidth % lanes<V>;
    for (int64_t k = 0; k < depth; ++k, from += down, to += kWidth) {
      for (int j = 0; j < kWidth - kRest; j += lanes<V>) store(to + j, load<V>(from + j));
      for (int j = kWidth - kRest; j < kWidth; ++j) to[j] = widen(from[j]);
    }
  } else {
    // Down the depth, where neighbours are, usually: a few lines of each row are in use at a time.
    constexpr int64_t kRun = 64;
    for (int64_t begin = 0; begin < depth; begin += kRun) {
      const int64_t end = smaller(begin + kRun, depth);
      for (int64_t i = 0; i < kWidth; ++i)
        for (int64_t k = begin; k < end; ++k)
          to[k * kWidth + i] = widen(from[k * down + i * across]);
    }
  }
}

template <int kWidth>
Pack find_pack(DType type) {
  switch (type) {
    case DType::f32:
      return &pack<kWidth, float>;
    case DType::bf16:
      return &pack<kWidth, bf16>;
    case DType::f16:
      return &pack<kWidth, f16>;
    default:
      return nullptr;
  }
}

// ---- bf16 in pairs ------------------------------------------------------------------------------

#if MBK_SIMD && defined(__AVX512F__)
#define MBK_PAIRS 1

// Pairs of the depth, the first one low; the last one of an odd depth is paired with 0.
template <int kWidth>
MBK_PASS void pack_pairs(void* packed, const Operand& o, int64_t first_k, int64_t first,
                         int64_t depth, int64_t count) {
  const uint16_t* from = begin_of<uint16_t>(o, first_k, first);
  const int64_t down = o.depth_stride, across = o.stride;
  uint32_t* to = (uint32_t*)packed;
  for (; depth >= 2 && count >= kWidth && across == 1; depth -= 2, from += 2 * down, to += kWidth)
    for (int i = 0; i < kWidth; ++i) to[i] = (uint32_t)from[i] | (uint32_t)from[down + i] << 16;
  for (int64_t k = 0; k < depth; k += 2, from += 2 * down, to += kWidth)
    for (int64_t i = 0; i < kWidth; ++i) {
      const uint32_t low = i < count ? from[i * across] : 0;
      const uint32_t high = i < count && k + 1 < depth ? from[down + i * across] : 0;
      to[i] = low | high << 16;
    }
}

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
static_assert(kBytesOfB + kChainDepth * kTileRows * 8 <= kProductScratch, "a strip of A fits");

// Columns that are packed at once, in whole tiles.
template <class T>
constexpr int64_t kPanelColumns =
    kBytesOfB / (kChainDepth * (int64_t)sizeof(T)) / kTileColumns<T> * kTileColumns<T>;

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
    if (first && p.from_zero && !blocks()) {
      place.start = p.start ? (const T*)p.start + j : nullptr;
      place.start_stride = 0;
    }
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

  MBK_RARE void set_start(int64_t j, int64_t columns) const {
    for (int64_t i = rows_begin; i < rows_end; ++i)
      for (int64_t s = j; s < j + columns; ++s)
        ((T*)p.c)[i * p.c_stride + s] = p.start ? ((const T*)p.start)[s] : (T)0;
  }

  // Whether the strip can be left out: C has been started, and takes nothing that is not small.
  MBK_RARE bool is_small(int64_t packed, bool first) const {
    if (first && p.from_zero && !blocks()) return false;
    return way.largest(strip, packed / way.element_bytes * kTileRows) < p.skip_below;
  }

  // Columns [j, j + columns), at most a panel.
  MBK_FN void run(int64_t j, int64_t columns) const {
    if (p.from_zero && (blocks() || !p.depth)) set_start(j, columns);
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

// Parts of C, enough of them that threads end together, yet with rows to use a panel for.
template <class T>
MBK_PASS void product(const ProductArgs& p, const Way<T>& way) {
  constexpr int64_t kLeastRows = 16 * kTileRows, kPartsOfThread = 4;
  const int64_t panels = (p.columns + kPanelColumns<T> - 1) / kPanelColumns<T>;
  if (!p.rows || !panels) return;
  const int64_t wanted = (p.threads > 1 ? p.threads * kPartsOfThread : 1) / panels + 1;
  int64_t rows = (p.rows + wanted - 1) / wanted;
  if (rows < kLeastRows) rows = kLeastRows;
  rows = (rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t parts = (p.rows + rows - 1) / rows;
  auto body = [&p, &way, rows, parts](int64_t begin, int64_t end, int thread) {
    char* const scratch = p.scratch + thread * kProductScratch;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k % parts * rows, j = k / parts * kPanelColumns<T>;
      const Part<T> part{p, way, scratch, scratch + kBytesOfB, i, smaller(p.rows, i + rows)};
      part.run(j, smaller(kPanelColumns<T>, p.columns - j));
    }
  };
  parallel_for(parts * panels, 1, p.threads, body);
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
