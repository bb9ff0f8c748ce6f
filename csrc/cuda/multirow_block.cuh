#pragma once
// One item of a loss of several rows, by a block of threads: a warp for each block of 1024 columns
// that is worked on at once. A thread has lanes k and k + 32 of the 64, so a warp joins the lanes
// of its block without a barrier. Passes read the rows anew, out of the second-level cache;
// exponentials are kept in shared memory, of as many columns as there is room for.
#include "cuda/multirow_columns.cuh"
#include "losses/all.h"

namespace mbk::MBK_ISA {

// Of a block of threads; fp64 needs more registers.
template <class T>
inline constexpr int kMostWarps = sizeof(T) == 4 ? 32 : 8;
inline constexpr int kMaximumAtOnce = 16;  // columns of a thread, and loads in flight
inline constexpr int kBlocksAtOnce = 32;   // of columns, whose sums wait to be added

struct MultirowLaunch {
  RowLaunch row;  // what it shares with losses of one row
  MultirowArgs args;
  int kept_blocks;  // of columns of a row, from the first on, whose exponentials are kept
};
// Losses whose later passes take what is kept instead of the row itself.
template <class Loss>
inline constexpr bool kKeptIsAll = false;
template <>
inline constexpr bool kKeptIsAll<SoftmaxFocalLoss> = true;
template <>
inline constexpr bool kKeptIsAll<JsDivWithLogits> = true;
template <>
inline constexpr bool kKeptIsAll<TvDistanceWithLogits> = true;

template <class Loss, class T>
struct MultirowBlock {
  typedef typename Pick<Loss::kWide, double, T>::type W;  // what is added up
  static constexpr bool kList = Loss::kTarget == ItemTarget::list;
  static constexpr bool kApart = Loss::kApart;
  static constexpr int kMostSums =
      Loss::kSums > Loss::kSecondSums ? Loss::kSums : Loss::kSecondSums;
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
    double block_sum[kMostSums][kBlocksAtOnce];
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

  MBK_DEVICE MultirowBlock(const MultirowLaunch& launch, Shared& memory)
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
  MBK_DEVICE ItemRow input(int i) const { return {a.inputs[i], shared.rows[i]}; }
  MBK_DEVICE ItemRow grad(int i) const { return {a.grads[i], shared.rows[Loss::kInputs + i]}; }

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
        for (int s = 0; s < sums_of<Loss>(kLevel); ++s) sum[s][k % 2] = sum[s][k % 2] + term[s];
      }
    }
  }
  template <int kGradients, class Columns>
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
        for (int i = 0; i < kGradients; ++i) one[i] = (T)wide[i];
      } else {
        const Column v = column(b, k);
        Loss::gradient(c, v.x, v.w, v.kept, one);
      }
      for (int i = 0; i < kGradients; ++i) g[i][k] = one[i];
    }
#pragma unroll
    for (int i = 0; i < kGradients; ++i)
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
          if (gradients) write_gradients<kLevel == 2 ? 1 : Loss::kGradients>(b, mask);
      });
      if constexpr (kLevel > 0) {
        for (int s = 0; s < sums_of<Loss>(kLevel); ++s) {
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
      if (threadIdx.x < sums_of<Loss>(kLevel))
        for (int n = 0; n < count; ++n) total += shared.block_sum[threadIdx.x][n];
    }
    if (warp() != 0) return;
    if (threadIdx.x < sums_of<Loss>(kLevel)) totals[threadIdx.x] = total;
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
        with_type<sizeof(T) == 8>(t.dtype, [&](auto* type) {
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
      item.label = read_column<double>(a.label, at.offset(a.label.strides));
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

}  // namespace mbk::MBK_ISA
