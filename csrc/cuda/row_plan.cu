#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/item_rows.cuh"
#include "cuda/row_plan.h"
#include "cuda/stage.cuh"

namespace mbk::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int log2_up(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

size_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Whether every row begins at a multiple of `bytes`, and its columns are next to one another.
bool is_aligned(const void* data, const Strides& s, size_t element, size_t bytes) {
  const auto fits = [&](int64_t stride) { return stride * (int64_t)element % (int64_t)bytes == 0; };
  return s.column == 1 && reinterpret_cast<uintptr_t>(data) % bytes == 0 && fits(s.outer) &&
         fits(s.inner);
}

// Loads are whole multiples of 16 bytes; stores are as wide as what a thread has in a row.
bool can_reside(const RowArgs& a, DType input) {
  const size_t in = size_of(input), out = a.accumulate ? 4 : in;
  return a.columns > 0 && a.columns * in % 16 == 0 &&
         is_aligned(a.input, a.input_strides, in, 16) &&
         (!a.grad || is_aligned(a.grad, a.grad_strides, out, 4 * out));
}

// Blocks, or clusters of them, that the device runs at once; asked once a kernel and shape. Of
// clusters there may be none on a part of a device (MIG), whose GPCs are small.
unsigned active(const Device& device, const RowPlan& plan) {
  using Key = std::tuple<int, RowKernel, unsigned, unsigned, size_t>;
  static std::mutex mutex;
  static std::map<Key, unsigned> known;
  const Key key{device.number, plan.kernel, plan.threads, plan.cluster, plan.shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int count = 0;
  check(max_active_clusters(&count, plan.kernel, plan.threads, plan.cluster, plan.shared_bytes),
        "asking how many blocks fit");
  return known[key] = static_cast<unsigned>(std::max(count, 0));
}

// The teams of a row: several rows a block if they are short, otherwise one a block or cluster.
struct Teams {
  int threads, teams, shift, cluster;
};
constexpr int kUsualThreads = 256;
constexpr int kOneRow = 16;  // a shift that leaves no second row

template <class T>
Teams share_rows(int64_t items, int64_t blocks_of_row, int64_t most_blocks, int clusters) {
  const int usual = kUsualThreads / kTeam<T>, most = kMaxThreads / kTeam<T>;
  const int shift = log2_up(std::min(blocks_of_row, most_blocks));
  if (1 << shift <= usual / 2) {
    // All items in one block, if it can be: such a call is one launch, with nothing to clear.
    const bool all = items << shift > usual && items << shift <= most;
    return {all ? kMaxThreads : kUsualThreads, 1 << shift, shift, 1};
  }
  // Blocks of the usual size, two or more of which a multiprocessor holds, as long as there are
  // clusters of them; then larger ones.
  for (const int teams : {usual, most})
    for (int cluster = 1; cluster <= clusters; cluster *= 2) {
      const int64_t share = ceil_div(std::min(blocks_of_row, most_blocks), cluster);
      const int even = static_cast<int>(share + share % 2);  // whole warps
      if (even <= teams) return {even * kTeam<T>, even, kOneRow, cluster};
    }
  return {};
}

template <class T>
RowPlan plan_teams(const Device& device, const RowKernels& kernels, DType input, RowLaunch& p) {
  const RowArgs& a = p.args;
  const int64_t blocks_of_row = std::max<int64_t>(1, ceil_div(a.columns, kBlock));
  Teams t{};
  RowPlan plan{};
  const size_t stage = size_of(input) * kBlock + sizeof(Barrier);  // of a team
  const auto shared_bytes = [&](bool resident) {
    const size_t teams = t.threads / kTeam<T>;
    return team_shared_bytes<T>(t.threads, t.cluster) + (resident ? teams * stage + 128 : 0);
  };
  const auto plan_of = [&](RowKernel kernel, bool resident) {
    return RowPlan{kernel, 0, static_cast<unsigned>(t.threads), static_cast<unsigned>(t.cluster),
                   shared_bytes(resident)};
  };
  if (kernels.resident && can_reside(a, input)) {
    constexpr int kPortableCluster = 8;
    t = share_rows<T>(a.items, blocks_of_row, blocks_of_row,
                      device.has_clusters ? kPortableCluster : 1);
    if (t.threads && shared_bytes(true) <= device.shared_bytes) {
      plan = plan_of(kernels.resident, true);
      if (t.cluster > 1 && !active(device, plan)) plan = {};
    }
  }
  if (!plan.kernel) {
    t = share_rows<T>(a.items, blocks_of_row, kMaxThreads / kTeam<T>, 1);
    plan = plan_of(kernels.reread, false);
  }
  p.teams = t.teams, p.team_shift = t.shift, p.cluster = t.cluster;
  p.rows_of_block = t.shift == kOneRow ? 1 : t.threads / kTeam<T> >> t.shift;
  p.waves = ceil_div(blocks_of_row, int64_t{t.teams} * t.cluster);
  const int64_t groups = std::max<int64_t>(1, ceil_div(a.items, p.rows_of_block));
  const int64_t clusters = std::min<int64_t>(groups, std::max(active(device, plan), 1u));
  plan.blocks = static_cast<unsigned>(clusters * t.cluster);
  p.row_step = clusters * p.rows_of_block;
  return plan;
}

RowPlan plan_items(const Device& device, const RowKernels& kernels, const RowArgs& a) {
  RowPlan plan{kernels.items, 1, kItemThreads, 1, sizeof(ExactSumState) + 32};
  const int64_t wanted = std::max<int64_t>(1, ceil_div(a.items, kItemThreads));
  plan.blocks =
      static_cast<unsigned>(std::min<int64_t>(wanted, std::max(active(device, plan), 1u)));
  return plan;
}

}  // namespace

RowPlan plan_rows(const Device& device, int loss, DType input, RowLaunch& launch) {
  const RowArgs& a = launch.args;
  using Find = RowKernels (*)(int, const RowArgs&);
  constexpr Find find[kDTypes] = {row_kernels_f32, row_kernels_bf16, row_kernels_f16,
                                  row_kernels_f64};
  const RowKernels kernels = find[static_cast<int>(input)](loss, a);
  constexpr int64_t kFewColumns = 64;  // too few for a team, even if they are neighbours
  if (a.columns <= (a.input_strides.column == 1 ? kFewColumns : kBlock))
    return plan_items(device, kernels, a);
  return input == DType::f64 ? plan_teams<double>(device, kernels, input, launch)
                             : plan_teams<float>(device, kernels, input, launch);
}

}  // namespace mbk::cuda
