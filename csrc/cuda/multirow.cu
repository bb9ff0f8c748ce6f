// Losses of several rows an item: a block of threads an item, 64 of them for each block of 1024
// columns that is worked on at once. Every pass reads the rows anew, out of the second-level cache.
// Also whole calls of them.
#include "core/multirow_items.h"
#include "cuda/reduce_launch.h"
#include "cuda/row_launch.cuh"
#include "losses/all.h"

namespace mbk::MBK_ISA {
namespace {

constexpr int kMaxSlots = 8;  // blocks of columns at once

struct MultirowLaunch {
  RowLaunch row;  // what it shares with losses of one row
  MultirowArgs args;
};

template <class T>
MBK_DEVICE T read_column(const RowTensor& t, int64_t offset) {
  T x = 0;
  with_storage(t.dtype, [&](auto* type) {
    x = (T)widen(((const StorageOf<decltype(type)>*)t.data)[offset]);
  });
  return x;
}
// A gradient, or old + gradient, as on the CPU.
template <class T>
MBK_DEVICE void write_column(const RowTensor& t, int64_t offset, T g, bool accumulate) {
  with_storage(t.dtype, [&](auto* type) {
    typedef StorageOf<decltype(type)> S;
    S& to = ((S*)t.data)[offset];
    Compute<S> v = (Compute<S>)g;
    if (accumulate) v = (Compute<S>)widen(to) + v;
    to = narrow<S>(canonical(v));
  });
}

template <class Loss, class T>
struct Block {
  typedef typename Pick<Loss::kWide, double, T>::type W;  // what is added up
  static constexpr bool kList = Loss::kTarget == ItemTarget::list;

  struct Shared {
    ExactSumState total;
    MultirowItem item;
    Constants c;
    double at_target;
    W upper[kMaxSums][kMaxSlots][kGroup / 2];
    double block_sum[kMaxSums][kMaxSlots];
    T max[kMaxSlots * 2];
    int bad, is_last;
    int64_t bad_value;
  };

  const MultirowLaunch& p;
  const MultirowArgs& a;
  Shared& shared;
  int32_t* const state;  // of a list: for each column 2 * (positive distances) + (is it a target)
  const ItemScale<T> item_scale;

  MBK_DEVICE Block(const MultirowLaunch& launch, Shared& memory)
      : p(launch),
        a(launch.args),
        shared(memory),
        state((int32_t*)(&memory + 1)),
        item_scale(launch.args) {}

  // What the passes know of a column.
  struct Column {
    T x[kMaxRows], w, kept[kMaxKept];
  };
  MBK_DEVICE Column column(const Constants& c, const ItemPosition& at, int64_t j) const {
    Column v{};
    if constexpr (Loss::kLevels > 0) {
      for (int i = 0; i < Loss::kInputs; ++i)
        v.x[i] = read_column<T>(a.inputs[i],
                                at.offset(a.inputs[i].strides) + j * a.inputs[i].strides.column);
    }
    v.w = Loss::kColumnWeights && a.class_weight ? ((const T*)a.class_weight)[j] : (T)1;
    if constexpr (kList) {
      v.kept[0] = (T)(state[j] & 1);
      v.kept[1] = (T)((state[j] - (state[j] & 1)) / 2);
    } else if constexpr (Loss::kKept > 0) {
      Loss::keep(c, v.x, v.kept);
    }
    return v;
  }

  // The largest number of row i, in every thread; false if a NaN is among them, or none is finite.
  MBK_DEVICE bool maximum(const ItemPosition& at, int i, double& result) const {
    T m = -(T)__builtin_inff();
    const int64_t offset = at.offset(a.inputs[i].strides);
    for (int64_t j = threadIdx.x; j < a.columns; j += blockDim.x)
      m = max_or_nan(m, read_column<T>(a.inputs[i], offset + j * a.inputs[i].strides.column));
    for (int step = 16; step; step /= 2) m = max_or_nan(m, __shfl_xor_sync(kWholeWarp, m, step));
    if (threadIdx.x % 32 == 0) shared.max[threadIdx.x / 32] = m;
    __syncthreads();
    m = shared.max[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; ++warp) m = max_or_nan(m, shared.max[warp]);
    __syncthreads();
    m = m + 0;  // a maximum of -0 is that of +0
    result = (double)m;
    return abs(m) < (T)__builtin_inff();
  }

  // One level of sums; in thread 0.
  template <int kLevel>
  MBK_DEVICE void sums(const ItemPosition& at, int64_t apart, double (&totals)[kMaxSums]) const {
    const Constants c = shared.c;
    const int lane = threadIdx.x % kGroup, slot = threadIdx.x / kGroup;
    const int slots = blockDim.x / kGroup;
    for (double& total : totals) total = 0;
    for (int64_t begin = 0; begin < a.columns; begin += slots * kBlock) {
      W sum[kMaxSums] = {};
      for (int64_t k = 0; k < kBlock; k += kGroup) {
        const int64_t j = begin + slot * kBlock + k + lane;
        if (j >= a.columns) break;
        const Column v = column(c, at, j);
        W term[kMaxSums];
        if constexpr (Loss::kWide) {
          W x[kMaxRows];
          for (int i = 0; i < kMaxRows; ++i) x[i] = (double)v.x[i];
          Loss::sums1(c, x, (W)0, (const W*)nullptr, term);
        } else if constexpr (kLevel == 1) {
          Loss::sums1(c, v.x, v.w, v.kept, term);
        } else {
          Loss::sums2(c, v.x, v.w, v.kept, term);
        }
        if constexpr (kList)
          if (term[1] != 0) state[j] += 2;
        if (j == apart) continue;
        for (int s = 0; s < Loss::kSums; ++s) sum[s] = sum[s] + term[s];
      }
      for (int s = 0; s < Loss::kSums; ++s)
        if (lane >= kGroup / 2) shared.upper[s][slot][lane - kGroup / 2] = sum[s];
      __syncthreads();
      if (lane < kGroup / 2) {
        for (int s = 0; s < Loss::kSums; ++s) {
          W joined = sum[s] + shared.upper[s][slot][lane];
          for (int step = kGroup / 4; step; step /= 2)
            joined = joined + __shfl_xor_sync(kWholeWarp, joined, step);
          if (lane == 0) shared.block_sum[s][slot] = (double)joined;
        }
      }
      __syncthreads();
      if (threadIdx.x == 0)
        for (int n = 0; n < slots && begin + n * kBlock < a.columns; ++n)
          for (int s = 0; s < Loss::kSums; ++s) totals[s] += shared.block_sum[s][n];
    }
  }

  MBK_DEVICE void gradient(const ItemPosition& at, int64_t apart) const {
    const Constants c = shared.c;
    for (int64_t j = threadIdx.x; j < a.columns; j += blockDim.x) {
      T g[kMaxRows] = {};
      const Column v = column(c, at, j);
      if constexpr (Loss::kWideGradient) {
        W x[kMaxRows], wide[kMaxRows];
        for (int i = 0; i < kMaxRows; ++i) x[i] = (double)v.x[i];
        Loss::gradient(c, x, (W)0, (const W*)nullptr, wide);
        for (int i = 0; i < Loss::kGradients; ++i) g[i] = (T)wide[i];
      } else {
        Loss::gradient(c, v.x, v.w, v.kept, g);
      }
      if (j == apart) g[0] = (T)shared.at_target;
      for (int i = 0; i < Loss::kGradients; ++i) write(at, i, j, canonical(g[i]));
    }
  }
  MBK_DEVICE void write(const ItemPosition& at, int i, int64_t j, T g) const {
    const RowTensor& to = a.grads[i];
    if (to.data) write_column(to, at.offset(to.strides) + j * to.strides.column, g, a.accumulate);
  }
  MBK_DEVICE T same_for_all(const ItemPosition& at, T value) const {
    if (!(a.accumulate && value == 0))
      for (int64_t j = threadIdx.x; j < a.columns; j += blockDim.x)
        for (int i = 0; i < Loss::kGradients; ++i) write(at, i, j, value);
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
    if (threadIdx.x == 0) shared.bad = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
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
    double total = 0, totals[kMaxSums];
    for (int64_t n = 0; listed(at, n) >= 0; ++n) {
      const int64_t y = listed(at, n);
      if (threadIdx.x == 0)
        shared.c.value[0] =
            1 - (double)read_column<T>(
                    a.inputs[0], at.offset(a.inputs[0].strides) + y * a.inputs[0].strides.column);
      __syncthreads();
      sums<1>(at, -1, totals);
      if (threadIdx.x == 0) {
        total += totals[0];
        state[y] -= 2 * (int32_t)totals[1];
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) shared.item.first[0] = total;
    return true;
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
        if (threadIdx.x == 0) note_bad_target(p.row, i, target);
        return same_for_all(at, nan);
      }
    }
    double max[2] = {};
    bool finite = true;
    for (int k = 0; k < Loss::kMaxima; ++k) finite = maximum(at, k, max[k]) && finite;
    if (!finite) return same_for_all(at, nan);
    const bool first = threadIdx.x == 0;
    MultirowItem& item = shared.item;
    Constants& c = shared.c;
    if (first) {
      item.max[0] = max[0], item.max[1] = max[1];
      item.scale = item_scale(a, at);
      item.target_weight = 1;
      if (Loss::kTarget == ItemTarget::number)
        item.label = (double)read_column<T>(a.label, at.offset(a.label.strides));
      T logit = 0;
      if constexpr (Loss::kApart) {
        logit = read_column<T>(
            a.inputs[0], at.offset(a.inputs[0].strides) + target * a.inputs[0].strides.column);
        item.target_logit = (double)logit;
        if (a.class_weight) item.target_weight = (double)((const T*)a.class_weight)[target];
      }
      Loss::begin(a, item, c);
      if constexpr (Loss::kApart && Loss::kKept > 0) {
        T term[kMaxKept];
        Loss::keep(c, &logit, term);
        item.target_term = (double)term[0];
      }
    }
    __syncthreads();
    const int64_t apart = Loss::kApart ? target : -1;
    if constexpr (kList) {
      if (!list_sums(i, at)) return same_for_all(at, nan);
    } else if constexpr (Loss::kLevels > 0) {
      double totals[kMaxSums];
      sums<1>(at, apart, totals);
      if (first)
        for (int s = 0; s < Loss::kSums; ++s) item.first[s] = totals[s];
      if constexpr (Loss::kLevels > 1) {
        if (first) Loss::between(a, item, c);
        __syncthreads();
        sums<2>(at, apart, totals);
        if (first)
          for (int s = 0; s < Loss::kSums; ++s) item.second[s] = totals[s];
      }
    }
    T loss = 0;
    __syncthreads();  // the passes have read the constants
    if (first) {
      if (Loss::kLevels > 0) Loss::finish(a, item);
      shared.at_target = Loss::factors(a, item, c);
      const double weight = (double)item_value<T>(a.sample_weight, a.sample_weight_strides, at);
      loss = canonical((T)(Loss::loss(a, item) * weight));
    }
    bool wanted = false;
    for (int k = 0; k < Loss::kGradients; ++k) wanted = wanted || a.grads[k].data;
    __syncthreads();
    if (wanted) gradient(at, apart);
    return loss;
  }
};

template <class Loss, class T>
__global__ void __launch_bounds__(kMaxSlots* kGroup, 1)
    multirow(const __grid_constant__ MultirowLaunch p) {
  typedef typename Block<Loss, T>::Shared Shared;
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) clear(shared.total);
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
  size_t shared_bytes;
};
template <class... L>
const Kernel& find(LossList<L...>, int loss, DType type) {
  static constexpr Kernel kernels[][2] = {
      {{&multirow<L, float>, sizeof(typename Block<L, float>::Shared)},
       {&multirow<L, double>, sizeof(typename Block<L, double>::Shared)}}...};
  return kernels[loss][type == DType::f64];
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
  const int64_t slots =
      std::min<int64_t>(kMaxSlots, std::max<int64_t>(1, (a.columns + kBlock - 1) / kBlock));
  const auto threads = static_cast<unsigned>(slots * kGroup);
  constexpr int64_t kThreadsAtOnce = 2048;  // of a multiprocessor
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(
      std::max<int64_t>(1, a.items), device.multiprocessors * (kThreadsAtOnce / threads)));
  check(launch(kernel.run, p, blocks, threads, 1, bytes, work.stream), "launching a loss of rows");
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
