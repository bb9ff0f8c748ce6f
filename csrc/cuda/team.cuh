#pragma once
// A team of threads, the teams of a row, and the warps that keep what belongs to no single row.
#include "cuda/packed.cuh"
#include "cuda/row_launch.cuh"

namespace mbk::MBK_ISA {

inline constexpr int kSteps = kBlock / kGroup;
inline constexpr int kMaxThreads = 512;
inline constexpr int kQueue = 32;  // items whose losses a warp computes at once

template <class T>
inline constexpr int kTeam = kGroup / kRun<T>;  // threads

// ---- one team -----------------------------------------------------------------------------------

template <class T, class V, class Join>
MBK_DEVICE V over_team(V x, Join join) {
#pragma unroll
  for (int offset = kTeam<T> / 2; offset; offset /= 2)
    x = join(x, __shfl_xor_sync(kWholeWarp, x, offset));
  return x;
}

// The sum of the kGroup lanes of a block, kRun of which each thread has, joined by halves; in every
// thread. The first joins swap halves of the threads' own lanes, so that each thread joins its
// share only: with four lanes a thread 7 shuffles instead of 16.
template <class T, class V>
MBK_DEVICE V join_team(const V (&lane)[kRun<T>]) {
  const int thread = threadIdx.x % kTeam<T>;
  constexpr int kTop = kTeam<T> / 2;
  const bool high = thread & kTop;
  V x;
  if constexpr (kRun<T> == 4) {
    const bool odd = thread & (kTop / 2);
    const V a =
        (high ? lane[2] : lane[0]) + __shfl_xor_sync(kWholeWarp, high ? lane[0] : lane[2], kTop);
    const V b =
        (high ? lane[3] : lane[1]) + __shfl_xor_sync(kWholeWarp, high ? lane[1] : lane[3], kTop);
    x = (odd ? b : a) + __shfl_xor_sync(kWholeWarp, odd ? a : b, kTop / 2);
#pragma unroll
    for (int offset = kTop / 4; offset; offset /= 2) x = x + __shfl_xor_sync(kWholeWarp, x, offset);
    x = x + __shfl_xor_sync(kWholeWarp, x, kTop);         // lanes k and k + 2
    return x + __shfl_xor_sync(kWholeWarp, x, kTop / 2);  // lanes k and k + 1
  } else {
    x = (high ? lane[1] : lane[0]) + __shfl_xor_sync(kWholeWarp, high ? lane[0] : lane[1], kTop);
#pragma unroll
    for (int offset = kTop / 2; offset; offset /= 2) x = x + __shfl_xor_sync(kWholeWarp, x, offset);
    return x + __shfl_xor_sync(kWholeWarp, x, kTop);
  }
}

// ---- shared memory ------------------------------------------------------------------------------

// Items waiting for their losses: one logarithm a row would hold up all of its threads.
template <class T>
struct LossQueue {
  int64_t item[kQueue];  // -1: none
  ItemKind kind[kQueue];
  T max[kQueue], target_logit[kQueue], target_term[kQueue], target_weight[kQueue],
      sample_weight[kQueue];
  double sums[3][kQueue];
};
template <class T>
struct WarpState {
  ExactSumState row[3], total;  // the sums of a row that bins do not hold; the warp's items
  LossQueue<T> queue;
};
// What a team tells the others of its row.
struct TeamState {
  double max, sums[3];
  int64_t first;  // column of its first maximum
};
inline constexpr int kCommonBytes = 192;  // what the items of a call have in common
template <class T>
MBK_FN size_t team_shared_bytes(int threads, int cluster) {
  const size_t bytes = kCommonBytes + sizeof(WarpState<T>) * (threads / 32) +
                       sizeof(TeamState) * (threads / kTeam<T>)*cluster;
  return (bytes + 127) / 128 * 128;
}

// The sums over the blocks of a row: exact, or in fp64 in order.
struct RowTotals {
  ThreadSum exact[3];
  double ordered[3] = {};
};

// ---- the teams of a row -------------------------------------------------------------------------

template <class T>
struct Team {
  const RowLaunch& p;
  unsigned char* const memory;
  int round = 0;  // rows that these teams have begun with, or kept company in

  MBK_DEVICE Team(const RowLaunch& launch, unsigned char* shared) : p(launch), memory(shared) {}

  // All of these cost an instruction or two, and registers are scarce.
  MBK_DEVICE int thread() const { return threadIdx.x % kTeam<T>; }                 // in its team
  MBK_DEVICE int group() const { return threadIdx.x / kTeam<T> >> p.team_shift; }  // in its block
  MBK_DEVICE int member() const {  // among the teams of its row
    return cluster_rank() * p.teams + threadIdx.x / kTeam<T> - (group() << p.team_shift);
  }
  MBK_DEVICE int total() const { return p.teams * p.cluster; }
  MBK_DEVICE bool speaks() const { return member() == 0 && thread() == 0; }  // for its row

  MBK_DEVICE size_t bytes() const { return team_shared_bytes<T>(blockDim.x, p.cluster); }
  MBK_DEVICE unsigned char* common() const { return memory + 16; }
  MBK_DEVICE int* is_last() const { return (int*)memory; }
  MBK_DEVICE WarpState<T>* warps() const { return (WarpState<T>*)(memory + kCommonBytes); }
  MBK_DEVICE WarpState<T>& warp() const { return warps()[threadIdx.x / 32]; }
  MBK_DEVICE TeamState* entries() const {  // of this row, one a team
    return (TeamState*)(warps() + blockDim.x / 32) + group() * total();
  }
  MBK_DEVICE int rows_of_warp() const { return p.teams == 1 ? 32 / kTeam<T> : 1; }
  // Whether this warp computes the losses of its rows.
  MBK_DEVICE bool is_owner() const {
    const int first = threadIdx.x / 32 * 32 / kTeam<T>;
    return cluster_rank() == 0 && first == (first >> p.team_shift) << p.team_shift;
  }

  MBK_DEVICE void begin() const {
    if (threadIdx.x % 32 == 0) {
      for (ExactSumState& s : warp().row) clear(s);
      clear(warp().total);
    }
    __syncthreads();
    if (p.cluster > 1) cluster_sync();  // the others' shared memory is there
  }
  MBK_DEVICE void sync() const {
    if (p.cluster > 1) {
      __syncwarp(kWholeWarp);  // the barrier of a cluster is for whole warps
      cluster_sync();
    } else if (p.teams * kTeam<T> > 32) {
      __syncthreads();
    } else {
      __syncwarp(kWholeWarp);
    }
  }
  // put(entry) writes this team's entry, in every block of the row. A field is read between the
  // sync that follows and the next one, and written again after that.
  template <class Put>
  MBK_DEVICE void publish(Put put) const {
    if (thread() < p.cluster)
      put(p.cluster > 1 ? cluster_map(entries(), (unsigned)thread())[member()]
                        : entries()[member()]);
    sync();
  }

  MBK_DEVICE T maximum(T m) const {
    const auto join = [](T a, T b) { return max_or_nan(a, b); };
    m = over_team<T>(m, join);
    if (total() == 1) return m;
    publish([m](TeamState& e) { e.max = (double)m; });
    for (int n = thread(); n < total(); n += kTeam<T>) m = max_or_nan(m, (T)entries()[n].max);
    return over_team<T>(m, join);
  }
  MBK_DEVICE int64_t minimum(int64_t first) const {
    const auto join = [](long long a, long long b) { return a < b ? a : b; };
    first = over_team<T>((long long)first, join);
    if (total() == 1) return first;
    publish([first](TeamState& e) { e.first = first; });
    for (int n = thread(); n < total(); n += kTeam<T>) first = join(first, entries()[n].first);
    return over_team<T>((long long)first, join);
  }

  // The sums of this team's block, one wave of the row, and after the last wave those of the row.
  // Sum `ordered` is in fp64 in order whatever T is; -1: none.
  template <int kSums, int kOrdered>
  MBK_DEVICE void add_wave(const double (&sums)[3], RowTotals& totals, bool last) const {
    if (total() == 1) {  // nothing to join
      for (int k = 0; k < kSums; ++k) totals.ordered[k] = sums[k];
      return;
    }
    publish([&sums](TeamState& e) {
      for (int k = 0; k < kSums; ++k) e.sums[k] = sums[k];
    });
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      if (sizeof(T) == 8 || k == kOrdered) {
        for (int n = 0; n < total(); ++n) totals.ordered[k] += entries()[n].sums[k];
      } else {
        for (int n = threadIdx.x % 32; n < total(); n += 32)
          totals.exact[k].add((float)entries()[n].sums[k], warp().row[k]);
      }
    }
    if (!last) sync();
  }
  // The same of a row of one wave, whose sums take their places.
  template <int kSums, int kOrdered>
  MBK_DEVICE void join_wave(double (&sums)[3]) const {
    if (total() == 1) return;
    publish([&sums](TeamState& e) {
      for (int k = 0; k < kSums; ++k) e.sums[k] = sums[k];
    });
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      if (sizeof(T) == 8 || k == kOrdered) {
        sums[k] = 0;
        for (int n = 0; n < total(); ++n) sums[k] += entries()[n].sums[k];
      } else {
        sums[k] = (double)joined(k);
      }
    }
  }
  // The exact sum of all teams' sums, rounded once. Sums of a usual size are added in fp64: of up
  // to 256 multiples of 2^-33 below 2^11 every bit is kept, as is of 32 multiples of 2^-36.
  MBK_DEVICE float joined(int k) const {
    const double least = total() > 32 ? 0x1p-10 : 0x1p-13;
    double sum = 0;
    bool usual = true;
    for (int n = threadIdx.x % 32; n < total(); n += 32) {
      const double x = entries()[n].sums[k];
      usual = usual && (x == 0 || (x >= least && x < 0x1p11));
      sum += x;
    }
    if (!__any_sync(kWholeWarp, !usual)) {
      for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, offset);
      return (float)sum;
    }
    ThreadSum exact;
    for (int n = threadIdx.x % 32; n < total(); n += 32)
      exact.add((float)entries()[n].sums[k], warp().row[k]);
    return exact.warp_total(warp().row[k]);
  }
  template <int kSums, int kOrdered>
  MBK_DEVICE void sums_of_row(RowTotals& totals, double (&sums)[3]) const {
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      sums[k] = total() == 1 || sizeof(T) == 8 || k == kOrdered
                    ? totals.ordered[k]
                    : (double)totals.exact[k].warp_total(warp().row[k]);
  }

  // ---- losses ----

  // Rounds since the queue was last empty.
  MBK_DEVICE int queued() const { return round & (kQueue / rows_of_warp() - 1); }

  template <class Item>
  MBK_DEVICE void push(int64_t i, const Item& item, T sample_weight, ItemKind kind) const {
    if (!speaks()) return;
    LossQueue<T>& q = warp().queue;
    const int slot = queued() * rows_of_warp() + threadIdx.x / kTeam<T> % rows_of_warp();
    q.item[slot] = i, q.kind[slot] = kind;
    q.max[slot] = (T)item.max, q.target_logit[slot] = (T)item.target_logit;
    q.target_term[slot] = (T)item.target_term, q.target_weight[slot] = (T)item.target_weight;
    q.sample_weight[slot] = sample_weight;
    for (int k = 0; k < 3; ++k) q.sums[k][slot] = item.sums[k];
  }
  // After each row.
  template <class Loss, class Call>
  MBK_DEVICE void flush_if_full(const Call& call) {
    ++round;
    if (queued() == 0) flush_items<Loss>(call, kQueue);
  }
  // The rest, in the end.
  template <class Loss, class Call>
  MBK_DEVICE void flush(const Call& call) {
    flush_items<Loss>(call, queued() * rows_of_warp());
  }
  template <class Loss, class Call>
  MBK_DEVICE void flush_items(const Call& call, int count) {
    const int slot = threadIdx.x % 32;
    if (!is_owner() || p.args.from_state) return;
    __syncwarp(kWholeWarp);
    const LossQueue<T>& q = warp().queue;
    ThreadSum sum;
    if (slot < count && q.item[slot] >= 0) {
      typename Loss::template Item<double> item;
      item.max = (double)q.max[slot], item.target_logit = (double)q.target_logit[slot];
      item.target_term = (double)q.target_term[slot];
      item.target_weight = (double)q.target_weight[slot];
      item.scale = 0;
      for (int k = 0; k < 3; ++k) item.sums[k] = q.sums[k][slot];
      const T loss = item_loss<Loss>(call, item, (double)q.sample_weight[slot], q.kind[slot]);
      if (p.args.losses) ((T*)p.args.losses)[q.item[slot]] = loss;
      if (sizeof(T) == 4 && p.totals) sum.add((float)loss, warp().total);
    }
    if (sizeof(T) == 4 && p.totals) sum.flush_warp(warp().total);
    __syncwarp(kWholeWarp);
  }

  // The end of the kernel.
  MBK_DEVICE void finish(double divisor) const {
    if (p.args.from_state) return;
    __syncthreads();
    if (threadIdx.x < sizeof(ExactSumState) / sizeof(int64_t)) {
      int64_t* const total = (int64_t*)&warps()[0].total + threadIdx.x;
      for (int w = 1; w < (int)(blockDim.x / 32); ++w)
        *total += *((const int64_t*)&warps()[w].total + threadIdx.x);
    }
    __syncthreads();
    finish_rows(p, divisor, warps()[0].total, is_last());
  }
};

}  // namespace mbk::MBK_ISA
