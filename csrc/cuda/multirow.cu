// Losses of several rows an item: a block of threads an item, a warp for each block of 1024 columns
// that is worked on at once. A thread has lanes k and k + 32 of the 64, so a warp joins the lanes
// of its block without a barrier. Passes read the rows anew, out of the second-level cache;
// exponentials are kept in shared memory, of as many columns as there is room for. Also whole calls
// of them.
#include "core/multirow_items.h"
#include "cuda/packed.cuh"
#include "cuda/reduce_launch.h"
#include "cuda/row_launch.cuh"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int kWarp = 32;
// Of a block of threads; fp64 needs more registers.
template <class T>
constexpr int kMostWarps = sizeof(T) == 4 ? 32 : 8;
constexpr int kMaximumAtOnce = 16;  // columns of a thread, and loads in flight
constexpr int kBlocksAtOnce = 32;   // of columns, whose sums wait to be added

struct MultirowLaunch {
  RowLaunch row;  // what it shares with losses of one row
  MultirowArgs args;
  int kept_blocks;  // of columns of a row, from the first on, whose exponentials are kept
};
// Losses whose later passes take what is kept instead of the row itself.
template <class Loss>
constexpr bool kKeptIsAll = false;
template <>
constexpr bool kKeptIsAll<SoftmaxFocalLoss> = true;
template <>
constexpr bool kKeptIsAll<JsDivWithLogits> = true;
template <>
constexpr bool kKeptIsAll<TvDistanceWithLogits> = true;

MBK_FN int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Calls f with a null pointer of a storage type; fp64 is out of the question in calls that compute
// in fp32.
template <class T, class F>
MBK_DEVICE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    default:
      if constexpr (sizeof(T) == 8) {
        if (dtype == DType::f64) return f((double*)nullptr);
      }
      return f((f16*)nullptr);
  }
}

// widen(x), and narrow(canonical(x)), in fewer instructions.
template <class S>
MBK_DEVICE Compute<S> widened(S x) {
#if defined(__CUDA_ARCH__)
  if constexpr (__is_same(S, f16)) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
  }
#endif
  return widen(x);
}
template <class S>
MBK_DEVICE S narrowed(Compute<S> x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 2) {
    constexpr uint16_t kNan = __is_same(S, bf16) ? 0x7fc0 : 0x7e00;
    return {x != x ? kNan : (uint16_t)pack_pair<S>(x, 0)};
  }
#endif
  return narrow<S>(canonical(x));
}

template <class T>
MBK_DEVICE T read_column(const RowTensor& t, int64_t offset) {
  T x = 0;
  with_type<T>(t.dtype, [&](auto* type) {
    x = (T)widened(((const StorageOf<decltype(type)>*)t.data)[offset]);
  });
  return x;
}
// A gradient, or old + gradient, as on the CPU.
template <class S, class T>
MBK_DEVICE void write_element(S* to, T g, bool accumulate) {
  Compute<S> v = (Compute<S>)g;
  if (accumulate) v = widened(*to) + v;
  *to = narrowed<S>(v);
}
template <class T>
MBK_DEVICE void write_column(const RowTensor& t, int64_t offset, T g, bool accumulate) {
  with_type<T>(t.dtype, [&](auto* type) {
    write_element((StorageOf<decltype(type)>*)t.data + offset, g, accumulate);
  });
}

// ---- several columns of a thread ----------------------------------------------------------------

// A thread's columns of a block of columns, every kWarp-th from its number in its warp on: kCount
// of them from the block's column `from`, or as many as there are of `size`. kDense: they are
// neighbours in memory, so that the steps between them are part of the instructions. Bits of a mask
// are columns.
template <int kCount, bool kDense>
struct Columns {
  static constexpr int count = kCount;
  static constexpr uint32_t kAll = (1u << kCount) - 1;
  int64_t first;  // of the row
  int in_block;
  uint32_t inside;

  MBK_DEVICE Columns(int64_t begin, int from, int size)
      : in_block(from + threadIdx.x % kWarp), inside(kAll) {
    first = begin + in_block;
    const int left = size - in_block;
    if (left <= (kCount - 1) * kWarp) inside = left <= 0 ? 0 : (2u << (left - 1) / kWarp) - 1;
  }
  MBK_DEVICE int64_t column(int k) const { return first + k * kWarp; }
  MBK_DEVICE bool has(int k) const { return inside >> k & 1; }
  // A column of the block, as a bit of the mask; 0 if it is none of these.
  MBK_DEVICE uint32_t bit(int column) const {
    const uint32_t away = (uint32_t)(column - in_block);
    return away < kCount * kWarp && away % kWarp == 0 ? 1u << away / kWarp : 0;
  }
  template <class S>
  MBK_DEVICE S* element(char* row, int64_t stride, int k) const {
    return kDense ? (S*)row + first + k * kWarp : (S*)row + column(k) * stride;
  }
};

// A row of an item.
struct Row {
  const RowTensor& tensor;
  int64_t before;  // bytes
  MBK_DEVICE char* data() const { return (char*)tensor.data + before; }
};

// All columns are asked for before one is looked at. Those that are not there are `outside`.
template <class S, int kCount, bool kDense, class T>
MBK_DEVICE void read_as(const Row& row, const Columns<kCount, kDense>& columns, T outside,
                        T (&x)[kCount]) {
  const int64_t stride = row.tensor.strides.column;
  S stored[kCount];
  const S* const from = columns.template element<const S>(row.data(), 0, 0);
  if (kDense && columns.inside == columns.kAll) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) stored[k] = from[k * kWarp];
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = (T)widened(stored[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      stored[k] = S{};
      if (columns.has(k)) stored[k] = *columns.template element<const S>(row.data(), stride, k);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = columns.has(k) ? (T)widened(stored[k]) : outside;
  }
}
template <int kCount, bool kDense, class T>
MBK_DEVICE void read_columns(const Row& row, const Columns<kCount, kDense>& columns, T outside,
                             T (&x)[kCount]) {
  with_type<T>(row.tensor.dtype,
               [&](auto* type) { read_as<StorageOf<decltype(type)>>(row, columns, outside, x); });
}
// Those of the mask: gradients, or old + gradient where they are accumulated, as on the CPU; dense
// ones are accumulated in T only.
template <int kCount, bool kDense, class T>
MBK_DEVICE void write_columns(const Row& row, const Columns<kCount, kDense>& columns, uint32_t mask,
                              bool accumulate, T (&x)[kCount]) {
  const int64_t stride = row.tensor.strides.column;
  if (kDense && accumulate) {
    T old[kCount];
    read_as<T>(row, columns, (T)0, old);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = old[k] + x[k];
  }
  with_type<T>(row.tensor.dtype, [&](auto* type) {
    typedef StorageOf<decltype(type)> S;
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (mask >> k & 1)
        write_element(columns.template element<S>(row.data(), stride, k), x[k],
                      !kDense && accumulate);
  });
}

// One number in every column of a dense row, 16 bytes at a time; by the whole block of threads.
template <class S>
MBK_DEVICE void fill_row(S* to, int64_t columns, S value) {
  constexpr int kCount = 16 / sizeof(S);
  struct alignas(16) Vector {
    S element[kCount];
  } vector;
#pragma unroll
  for (int k = 0; k < kCount; ++k) vector.element[k] = value;
  const int64_t before = (int64_t)(-(uintptr_t)to % 16 / sizeof(S));
  const int64_t head = before < columns ? before : columns;
  const int64_t vectors = (columns - head) / kCount, tail = head + vectors * kCount;
  Vector* const aligned = (Vector*)(to + head);
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < vectors; n += blockDim.x) aligned[n] = vector;
  if (threadIdx.x < head) to[threadIdx.x] = value;
  if (threadIdx.x < columns - tail) to[tail + threadIdx.x] = value;
}

// ---- one item -----------------------------------------------------------------------------------

template <class Loss, class T>
struct Block {
  typedef typename Pick<Loss::kWide, double, T>::type W;  // what is added up
  static constexpr bool kList = Loss::kTarget == ItemTarget::list;
  static constexpr bool kApart = Loss::kApart;
  static constexpr bool kKeeps = Loss::kKept > 0 && !kList && sizeof(T) == 4;
  static_assert(!kApart || Loss::kGradients == 1);
  // Columns that a thread has at once, so that as many loads are in flight. Fewer where the maxima
  // have brought the row nearer or registers are scarce, fewest where columns are not dense.
  static constexpr bool kScarce =
      Loss::kMaxima > 0 || Loss::kWide || Loss::kFusedLevel > 0 || kList;
  static constexpr int kRows = Loss::kInputs == 1 ? 1 : 2;
  static constexpr int kColumns = (sizeof(T) == 8 ? 4 : kScarce ? 8 : 16) / kRows;
  static constexpr int kFew = 2;
  static_assert(kColumns % 2 == 0 && kFew % 2 == 0, "lanes k and k + 32 take turns");

  struct Shared {
    ExactSumState total;
    MultirowItem item;
    ItemScale<T> item_scale;
    Constants c;
    LaneConstants<T> rounded;  // the same, as columns take them
    double at_target;
    double block_sum[Loss::kSums][kBlocksAtOnce];
    T max[2][kMostWarps<T>];
    int64_t rows[Loss::kInputs + Loss::kGradients];  // bytes before the item's
    int bad, is_last;
  };

  const MultirowLaunch& p;
  const MultirowArgs& a;
  Shared& shared;
  // Behind the shared memory, for losses with exponentials: kept_blocks of T for each that is kept.
  T* const kept;
  int32_t* const state;  // of a list: for each column 2 * (positive distances) + (is it a target)
  const bool dense_inputs, dense_grads;

  MBK_DEVICE Block(const MultirowLaunch& launch, Shared& memory)
      : p(launch),
        a(launch.args),
        shared(memory),
        kept((T*)(&memory + 1)),
        state((int32_t*)(&memory + 1)),
        dense_inputs(dense<Loss::kInputs>(launch.args.inputs, false)),
        dense_grads(dense<Loss::kGradients>(launch.args.grads, launch.args.accumulate)) {}

  template <int kRows>
  MBK_DEVICE static bool dense(const RowTensor* rows, bool accumulate) {
    bool all = true;
    for (int i = 0; i < kRows; ++i) {
      const bool suited = !accumulate || rows[i].dtype == kDTypeOf<T>;
      all = all && (!rows[i].data || (rows[i].strides.column == 1 && suited));
    }
    return all;
  }
  MBK_DEVICE static bool first() { return threadIdx.x == 0; }
  MBK_DEVICE static int lane() { return threadIdx.x % kWarp; }
  MBK_DEVICE static int warp() { return threadIdx.x / kWarp; }
  MBK_DEVICE static int warps() { return blockDim.x / kWarp; }
  MBK_DEVICE int64_t blocks() const { return (a.columns + kBlock - 1) / kBlock; }

  // Calls f with the columns of a block, several at a time.
  template <int kCount, class F>
  MBK_DEVICE void each_batch(int64_t begin, bool dense, F f) const {
    const int size = a.columns - begin < kBlock ? (int)(a.columns - begin) : (int)kBlock;
    if constexpr (sizeof(T) == 4) {  // fp64 takes its time anyway
      if (dense) {
#pragma unroll 1
        for (int k = 0; k < size; k += kCount * kWarp) f(Columns<kCount, true>(begin, k, size));
        return;
      }
    }
#pragma unroll 1
    for (int k = 0; k < size; k += kFew * kWarp) f(Columns<kFew, false>(begin, k, size));
  }

  // Where the item's rows begin: in shared memory it takes no registers. A barrier must follow.
  MBK_DEVICE void open_rows(const ItemPosition& at) const {
    const int i = threadIdx.x;
    if (i >= Loss::kInputs + Loss::kGradients) return;
    const RowTensor& t = i < Loss::kInputs ? a.inputs[i] : a.grads[i - Loss::kInputs];
    shared.rows[i] = at.offset(t.strides) * bytes_of(t.dtype);
  }
  MBK_DEVICE Row input(int i) const { return {a.inputs[i], shared.rows[i]}; }
  MBK_DEVICE Row grad(int i) const { return {a.grads[i], shared.rows[Loss::kInputs + i]}; }

  // The largest number of each row that needs it, in every thread; false if a NaN is among them, or
  // none is finite.
  MBK_DEVICE bool maxima(double (&result)[2]) const {
    if constexpr (Loss::kMaxima > 0) {
      __syncthreads();  // the rows are known
      const T low = -(T)__builtin_inff();
      T m[Loss::kMaxima];
      for (T& largest : m) largest = low;
#pragma unroll 1
      for (int64_t begin = warp() * kBlock; begin < a.columns; begin += warps() * kBlock)
        each_batch<kMaximumAtOnce>(begin, dense_inputs, [&](auto columns) {
#pragma unroll
          for (int i = 0; i < Loss::kMaxima; ++i) {
            T x[columns.count];
            read_columns(input(i), columns, low, x);
#pragma unroll
            for (int k = 0; k < columns.count; ++k) m[i] = max_or_nan(m[i], x[k]);
          }
        });
      bool finite = true;
#pragma unroll
      for (int i = 0; i < Loss::kMaxima; ++i) {
        m[i] = over_warp(m[i]);
        if (lane() == 0) shared.max[i][warp()] = m[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Loss::kMaxima; ++i) {
        m[i] = over_warp(lane() < warps() ? shared.max[i][lane()] : low);
        m[i] = m[i] + 0;  // a maximum of -0 is that of +0
        result[i] = (double)m[i];
        finite = finite && abs(m[i]) < (T)__builtin_inff();
      }
      return finite;
    }
    return true;
  }
  MBK_DEVICE static T over_warp(T m) {
    for (int step = kWarp / 2; step; step /= 2)
      m = max_or_nan(m, __shfl_xor_sync(kWholeWarp, m, step));
    return m;
  }

  // What the passes know of a batch of columns.
  template <class Columns>
  struct Batch {
    Columns columns;
    T x[kMaxRows][Columns::count], w[Columns::count], kept[kMaxKept][Columns::count];
  };
  template <int kLevel, class Columns>
  MBK_DEVICE Batch<Columns> read(const Columns& columns, bool are_kept) const {
    Batch<Columns> b{columns, {}, {}, {}};
    const bool from_kept = kKeeps && kLevel != 1 && are_kept;
    if (!(kKeptIsAll<Loss> && from_kept)) {
#pragma unroll
      for (int i = 0; i < Loss::kInputs; ++i) read_columns(input(i), columns, (T)0, b.x[i]);
    }
    if constexpr (Loss::kColumnWeights) {
#pragma unroll
      for (int k = 0; k < columns.count; ++k)
        b.w[k] =
            a.class_weight && columns.has(k) ? ((const T*)a.class_weight)[columns.column(k)] : (T)1;
    }
    if constexpr (kList) {
#pragma unroll
      for (int k = 0; k < columns.count; ++k) {
        const int32_t s = columns.has(k) ? state[columns.column(k)] : 0;
        b.kept[0][k] = (T)(s & 1);
        b.kept[1][k] = (T)((s - (s & 1)) / 2);
      }
    } else if constexpr (Loss::kKept > 0) {
      if (from_kept) {
#pragma unroll
        for (int k = 0; k < columns.count; ++k)
          for (int n = 0; n < Loss::kKept; ++n) b.kept[n][k] = *keeper(columns, n, k);
      } else {
        const auto c = constants<false>();
#pragma unroll
        for (int k = 0; k < columns.count; ++k) {
          const Column v = column(b, k);
          T one[kMaxKept];
          Loss::keep(c, v.x, one);
          for (int n = 0; n < Loss::kKept; ++n) b.kept[n][k] = one[n];
        }
      }
      if (kKeeps && kLevel == 1 && are_kept) {
#pragma unroll
        for (int k = 0; k < columns.count; ++k)
          for (int n = 0; n < Loss::kKept; ++n) *keeper(columns, n, k) = b.kept[n][k];
      }
    }
    return b;
  }
  // Where kept number n of column k waits for the later passes.
  template <class Columns>
  MBK_DEVICE T* keeper(const Columns& columns, int n, int k) const {
    return kept + (n * p.kept_blocks * (int)kBlock + (int)columns.first) + k * kWarp;
  }
  // Column k of them.
  struct Column {
    T x[kMaxRows], w, kept[kMaxKept];
  };
  template <class Columns>
  MBK_DEVICE static Column column(const Batch<Columns>& b, int k) {
    Column v{};
    for (int i = 0; i < Loss::kInputs; ++i) v.x[i] = b.x[i][k];
    v.w = Loss::kColumnWeights ? b.w[k] : (T)1;
    for (int n = 0; n < Loss::kKept; ++n) v.kept[n] = b.kept[n][k];
    return v;
  }

  // The columns' constants: as they are where columns are widened.
  template <bool kWide>
  MBK_DEVICE auto constants() const {
    if constexpr (kWide)
      return shared.c;
    else
      return shared.rounded;
  }

  template <int kLevel, class Columns>
  MBK_DEVICE void add_terms(const Batch<Columns>& b, uint32_t mask, W (&sum)[kMaxSums][2]) const {
    const auto c = constants<Loss::kWide>();
#pragma unroll
    for (int k = 0; k < Columns::count; ++k) {
      W term[kMaxSums];
      if constexpr (Loss::kWide) {
        W x[kMaxRows];
        for (int i = 0; i < kMaxRows; ++i) x[i] = (double)b.x[i][k];
        Loss::sums1(c, x, (W)0, (const W*)nullptr, term);
      } else {
        const Column v = column(b, k);
        if constexpr (kLevel == 1) Loss::sums1(c, v.x, v.w, v.kept, term);
        if constexpr (kLevel == 2) Loss::sums2(c, v.x, v.w, v.kept, term);
      }
      if (mask >> k & 1) {
        if constexpr (kList)
          if (term[1] != 0) state[b.columns.column(k)] += 2;
        for (int s = 0; s < Loss::kSums; ++s) sum[s][k % 2] = sum[s][k % 2] + term[s];
      }
    }
  }
  template <class Columns>
  MBK_DEVICE void write_gradients(const Batch<Columns>& b, uint32_t mask) const {
    const auto c = constants<Loss::kWideGradient>();
    T g[kMaxRows][Columns::count];
#pragma unroll
    for (int k = 0; k < Columns::count; ++k) {
      T one[kMaxRows] = {};
      if constexpr (Loss::kWideGradient) {
        W x[kMaxRows], wide[kMaxRows];
        for (int i = 0; i < kMaxRows; ++i) x[i] = (double)b.x[i][k];
        Loss::gradient(c, x, (W)0, (const W*)nullptr, wide);
        for (int i = 0; i < Loss::kGradients; ++i) one[i] = (T)wide[i];
      } else {
        const Column v = column(b, k);
        Loss::gradient(c, v.x, v.w, v.kept, one);
      }
      for (int i = 0; i < Loss::kGradients; ++i) g[i][k] = one[i];
    }
#pragma unroll
    for (int i = 0; i < Loss::kGradients; ++i)
      if (a.grads[i].data) write_columns(grad(i), b.columns, mask, a.accumulate, g[i]);
  }

  // This warp's blocks of the row among [begin, end): their sums, their gradients, or both.
  template <int kLevel>
  MBK_DEVICE void pass(int64_t apart, int64_t begin, int64_t end, bool gradients) const {
#pragma unroll 1
    for (int64_t block = begin + warp(); block < end; block += warps()) {
      W sum[kMaxSums][2] = {};
      const bool dense = dense_inputs && (!gradients || dense_grads);
      const int64_t from = apart - block * kBlock;
      const int apart_here = kApart && (uint64_t)from < (uint64_t)kBlock ? (int)from : -kBlock;
      each_batch<kColumns>(block * kBlock, dense, [&](auto columns) {
        const auto b = read<kLevel>(columns, block < p.kept_blocks);
        const uint32_t mask = columns.inside & ~(kApart ? columns.bit(apart_here) : 0);
        if constexpr (kLevel > 0) add_terms<kLevel>(b, mask, sum);
        if constexpr (kLevel == 0 || kLevel == Loss::kFusedLevel)
          if (gradients) write_gradients(b, mask);
      });
      if constexpr (kLevel > 0) {
        for (int s = 0; s < Loss::kSums; ++s) {
          W joined = sum[s][0] + sum[s][1];
          for (int step = kWarp / 2; step; step /= 2)
            joined = joined + __shfl_xor_sync(kWholeWarp, joined, step);
          if (lane() == 0) shared.block_sum[s][block - begin] = (double)joined;
        }
      }
    }
  }
  // One level of sums, for the first warp to see; and the gradients, if the level has them.
  template <int kLevel>
  MBK_DEVICE void sums(int64_t apart, bool gradients, double (&totals)[kMaxSums]) const {
    double total = 0;  // thread s has that of sum s
#pragma unroll 1
    for (int64_t begin = 0; begin < blocks(); begin += kBlocksAtOnce) {
      const int64_t left = blocks() - begin;
      const int count = left < kBlocksAtOnce ? (int)left : kBlocksAtOnce;
      if (begin > 0) __syncthreads();  // the sums before have been added
      pass<kLevel>(apart, begin, begin + count, gradients);
      __syncthreads();
      if (threadIdx.x < Loss::kSums)
        for (int n = 0; n < count; ++n) total += shared.block_sum[threadIdx.x][n];
    }
    if (warp() != 0) return;
    if (threadIdx.x < Loss::kSums) totals[threadIdx.x] = total;
    __syncwarp(kWholeWarp);
  }

  // One number for every column of the gradients.
  MBK_DEVICE T same_for_all(const ItemPosition& at, T value) const {
    if (a.accumulate && value == 0) return value;
    for (int i = 0; i < Loss::kGradients; ++i) {
      const RowTensor& t = a.grads[i];
      const int64_t offset = at.offset(t.strides), stride = t.strides.column;
      if (!t.data) continue;
      if (stride == 1 && !a.accumulate) {
        with_type<T>(t.dtype, [&](auto* type) {
          typedef StorageOf<decltype(type)> S;
          fill_row((S*)t.data + offset, a.columns, narrowed<S>((Compute<S>)value));
        });
      } else {
        for (int64_t j = threadIdx.x; j < a.columns; j += blockDim.x)
          write_column(t, offset + j * stride, value, a.accumulate);
      }
    }
    return value;
  }

  // Class y of a list; -1 behind its end.
  MBK_DEVICE int64_t listed(const ItemPosition& at, int64_t n) const {
    return n < a.columns ? read_index(a.target, a.target_type,
                                      at.offset(a.target_strides) + n * a.target_strides.column)
                         : -1;
  }
  // A level of sums for each target, in the order of the list. False: a class is out of range.
  MBK_DEVICE bool list_sums(int64_t i, const ItemPosition& at) const {
    for (int64_t j = threadIdx.x; j < a.columns; j += blockDim.x) state[j] = 0;
    if (first()) shared.bad = 0;
    __syncthreads();
    if (first()) {
      for (int64_t n = 0; listed(at, n) != -1; ++n) {
        const int64_t y = listed(at, n);
        if ((uint64_t)y >= (uint64_t)a.columns) {
          note_bad_target(p.row, i, y);
          shared.bad = 1;
          break;
        }
        state[y] = 1;
      }
    }
    __syncthreads();
    if (shared.bad) return false;
    double total = 0;
    for (int64_t n = 0; listed(at, n) >= 0; ++n) {
      const int64_t y = listed(at, n);
      if (first()) {
        shared.c.value[0] = 1 - (double)read_column<T>(a.inputs[0], position(at, y));
        round_constants();
      }
      __syncthreads();
      sums<1>(-1, false, shared.item.first);
      if (first()) {
        total += shared.item.first[0];
        state[y] -= 2 * (int32_t)shared.item.first[1];
      }
      __syncthreads();
    }
    if (first()) shared.item.first[0] = total;
    return true;
  }
  // Column j of the first row.
  MBK_DEVICE int64_t position(const ItemPosition& at, int64_t j) const {
    return at.offset(a.inputs[0].strides) + j * a.inputs[0].strides.column;
  }

  // ---- what the first thread does between passes

  MBK_DEVICE void round_constants() const {
    for (int k = 0; k < Loss::kConstants; ++k) shared.rounded.value[k] = (T)shared.c.value[k];
  }
  MBK_DEVICE void begin(const ItemPosition& at, int64_t target, T logit,
                        const double (&max)[2]) const {
    MultirowItem& item = shared.item;
    Constants& c = shared.c;
    item = MultirowItem{};
    item.max[0] = max[0], item.max[1] = max[1];
    item.scale = shared.item_scale(a, at);
    item.target_weight = 1;
    if (Loss::kTarget == ItemTarget::number)
      item.label = (double)read_column<T>(a.label, at.offset(a.label.strides));
    if constexpr (kApart) {
      item.target_logit = (double)logit;
      if (a.class_weight) item.target_weight = (double)((const T*)a.class_weight)[target];
    }
    Loss::begin(a, item, c);
    if constexpr (kApart && Loss::kKept > 0) {
      T term[kMaxKept];
      Loss::keep(c, &logit, term);
      item.target_term = (double)term[0];
    }
  }
  MBK_DEVICE T loss(const ItemPosition& at) const {
    const double weight = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
    return canonical((T)(Loss::loss(a, shared.item) * weight));
  }

  // Item i: its gradients, and its loss, in thread 0.
  MBK_DEVICE T item(int64_t i) const {
    const ItemPosition at(a, i);
    const T nan = canonical((T)__builtin_nanf(""));
    int64_t target = -1;
    if (Loss::kTarget == ItemTarget::index && a.target) {
      target = read_index(a.target, a.target_type, at.offset(a.target_strides));
      if (target == a.ignore_index) return same_for_all(at, 0);
      if ((uint64_t)target >= (uint64_t)a.columns) {
        if (first()) note_bad_target(p.row, i, target);
        return same_for_all(at, nan);
      }
    }
    open_rows(at);
    T logit = 0;  // asked for before the maxima, which take as long
    if (kApart && first()) logit = read_column<T>(a.inputs[0], position(at, target));
    double max[2] = {};
    if (!maxima(max)) return same_for_all(at, nan);
    const bool wanted = any_gradient(), fused = wanted && Loss::can_fuse(a);
    const int64_t apart = kApart ? target : -1;
    MultirowItem& item = shared.item;
    Constants& c = shared.c;
    if (first()) {
      begin(at, target, logit, max);
      if (Loss::kFusedLevel == 1 && fused) Loss::factors(a, item, c);
      round_constants();
    }
    __syncthreads();
    if constexpr (kList) {
      if (!list_sums(i, at)) return same_for_all(at, nan);
    } else if constexpr (Loss::kLevels > 0) {
      sums<1>(apart, fused, item.first);
      if constexpr (Loss::kLevels > 1) {
        if (first()) {
          Loss::between(a, item, c);
          if (Loss::kFusedLevel == 2 && fused) Loss::factors(a, item, c);
          round_constants();
        }
        __syncthreads();
        sums<2>(apart, fused, item.second);
      }
    }
    if (first()) {
      if (Loss::kLevels > 0) Loss::finish(a, item);
      if (wanted) {
        shared.at_target = Loss::factors(a, item, c);
        round_constants();
      }
    }
    __syncthreads();
    const T result = first() ? loss(at) : (T)0;
    if (wanted) {
      if constexpr (Loss::kLevels == 0) {
        same_for_all(at, 0);
        __syncthreads();
      } else {
        if (Loss::kFusedLevel == 0 || !fused) pass<0>(apart, 0, blocks(), true);
      }
      if (kApart && owns(apart))
        write_column(a.grads[0], at.offset(a.grads[0].strides) + apart * a.grads[0].strides.column,
                     (T)shared.at_target, a.accumulate);
    }
    return result;
  }
  MBK_DEVICE bool any_gradient() const {
    bool wanted = false;
    for (int k = 0; k < Loss::kGradients; ++k) wanted = wanted || a.grads[k].data;
    return wanted;
  }
  // Whether it is this thread that has read column j in the pass for the gradients.
  MBK_DEVICE static bool owns(int64_t j) {
    return j / kBlock % warps() == warp() && j % kWarp == lane();
  }
};

template <class Loss, class T>
__global__ void __launch_bounds__(kMostWarps<T>* kWarp, 1)
    multirow(const __grid_constant__ MultirowLaunch p) {
  typedef typename Block<Loss, T>::Shared Shared;
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    clear(shared.total);
    shared.item_scale = ItemScale<T>(p.args);
    shared.c = Constants{};
  }
  __syncthreads();
  const Block<Loss, T> block(p, shared);
  for (int64_t i = blockIdx.x; i < p.args.items; i += gridDim.x) {
    const T loss = block.item(i);
    if (threadIdx.x == 0) {
      if (p.args.losses) ((T*)p.args.losses)[i] = loss;
      if (sizeof(T) == 4 && p.row.totals) add(shared.total, (float)loss);
    }
    __syncthreads();  // before the next item takes the shared memory
  }
  finish_rows(p.row, read(p.args.denominator), shared.total, &shared.is_last);
}

struct Kernel {
  void (*run)(MultirowLaunch);
  size_t shared_bytes, kept_bytes;  // a block of columns
  int levels;
};
template <class Loss, class T>
constexpr Kernel kernel_of() {
  typedef Block<Loss, T> B;
  return {&multirow<Loss, T>, sizeof(typename B::Shared),
          B::kKeeps ? Loss::kKept * kBlock * sizeof(T) : 0, Loss::kLevels};
}
template <class... L>
const Kernel& find(LossList<L...>, int loss, DType type) {
  static constexpr Kernel kernels[][2] = {{kernel_of<L, float>(), kernel_of<L, double>()}...};
  return kernels[loss][type == DType::f64];
}

// How a kernel is launched.
struct Shape {
  unsigned blocks, threads;
  int kept_blocks;
  size_t shared_bytes;
};
// `bytes` of shared memory are needed.
template <class T>
Shape shape_of(const Device& device, const Kernel& kernel, const MultirowArgs& a, size_t bytes) {
  constexpr int64_t kThreadsAtOnce = sizeof(T) == 4 ? 1024 : 512;  // by their registers
  constexpr int64_t kMostResident = 32;  // blocks of threads of a multiprocessor
  // Two such rows a multiprocessor stay in the second-level cache of sm_80 and sm_90, which is of
  // 380 KB for each. Of larger ones there is one.
  constexpr int64_t kLongRow = 160 << 10;
  int64_t row = 0;
  for (const RowTensor& input : a.inputs)
    if (input.data) row += a.columns * bytes_of(input.dtype);
  const int64_t columns = std::max<int64_t>(1, (a.columns + kBlock - 1) / kBlock);  // in blocks
  const int64_t most = row > kLongRow ? kMostWarps<T> : std::min(kMostWarps<T>, 16);
  const int64_t threads = std::min(most, columns) * kWarp;
  const int64_t resident = std::min(kMostResident, std::max<int64_t>(1, kThreadsAtOnce / threads));
  const int64_t blocks = device.multiprocessors * resident;
  Shape s{};
  s.threads = static_cast<unsigned>(threads);
  s.blocks = static_cast<unsigned>(std::min(std::max<int64_t>(1, a.items), blocks));
  s.shared_bytes = bytes;
  bool passes = kernel.levels > 1;  // after the one that keeps
  for (const RowTensor& grad : a.grads) passes = passes || grad.data;
  if (!kernel.kept_bytes || !passes) return s;
  // As many as leave room for three quarters of the threads.
  constexpr int64_t kReserved = 1024;  // of a block, by the system
  const int64_t room = static_cast<int64_t>(device.shared_bytes) / (resident - resident / 4) -
                       kReserved - static_cast<int64_t>(bytes);
  const auto size = static_cast<int64_t>(kernel.kept_bytes);
  s.kept_blocks = static_cast<int>(std::max<int64_t>(0, std::min(columns, room / size)));
  s.shared_bytes += static_cast<size_t>(s.kept_blocks * size);
  return s;
}

template <class T>
void run(const Queue& queue, int loss, DType type, MultirowArgs a, const Result& result) {
  const MultirowTraits& traits = multirow_traits(loss);
  const Device& device = current_device();
  const Work work(queue, a.items);
  work.clear();
  traits.prepare(a);
  a.target_is_index = traits.target == ItemTarget::index && a.target;
  RowArgs weighed = a;
  if (!traits.weighs_divisor) weighed.class_weight = nullptr;

  const bool mean = result.reduction == Reduction::mean;
  const bool weighted = a.target_is_index || a.sample_weight;
  const double items = static_cast<double>(a.items);
  a.denominator = !mean                    ? Scalar{1, nullptr, DType::f64}
                  : result.has_denominator ? result.denominator
                  : weighted               ? Scalar{0, &work.state->divisor, DType::f64}
                                           : Scalar{items, nullptr, DType::f64};
  if (mean && !result.has_denominator && weighted)
    launch_reduce<T>(work, ItemWeights<T>{weighed}, a.items,
                     {&work.state->divisor, 1, nullptr, {}, {}});
  const bool reduces = (result.reduction != Reduction::none && result.loss) || result.loss_sum;
  if (reduces && sizeof(T) == 8 && !a.losses) a.losses = work.losses;
  MultirowLaunch p{};
  p.row.args = a, p.args = a;
  p.row.result = result, p.row.work = work.state, p.row.errors = device.errors;
  p.row.totals = reduces && sizeof(T) == 4;

  const Kernel& kernel = find(MultirowLosses{}, loss, type);
  size_t bytes = kernel.shared_bytes;
  if (traits.target == ItemTarget::list) bytes += static_cast<size_t>(a.columns) * sizeof(int32_t);
  if (bytes > device.shared_bytes)
    throw std::runtime_error("mbkern: rows of " + std::to_string(a.columns) +
                             " classes with lists of targets are too long for a CUDA device");
  const Shape shape = shape_of<T>(device, kernel, a, bytes);
  p.kept_blocks = shape.kept_blocks;
  check(launch(kernel.run, p, shape.blocks, shape.threads, 1, shape.shared_bytes, work.stream),
        "launching a loss of rows");
  if (reduces && sizeof(T) == 8)
    launch_reduce<T>(work, Array<T>{static_cast<const T*>(a.losses)}, a.items,
                     {nullptr, 1, nullptr, result, a.denominator});
}

}  // namespace

void run_multirow_loss(const Queue& queue, int loss, DType type, MultirowArgs args,
                       const Result& result) {
  type == DType::f64 ? run<double>(queue, loss, type, args, result)
                     : run<float>(queue, loss, type, args, result);
}

}  // namespace mbk::MBK_ISA
