#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "core/environment.h"

// libgomp's entry points, also exported by libomp and libiomp5. Declared here, weak, instead of
// linked: torch opens its runtime globally, so they resolve to the pool that torch uses, whatever
// its file is called; with no runtime loaded they are null and loops run serially.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads,
                                         unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}

namespace mbk {
namespace {

// libgomp's workers do not exist in a forked child, and entering a region there hangs.
std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Loop {
  int64_t n, step;
  void* context;
  Task task;
  std::atomic<int64_t> next{0};
};

void work(Loop& loop, int thread) {
  const DefaultEnvironment environment;
  for (;;) {
    const int64_t begin = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
    if (begin >= loop.n) return;
    loop.task(loop.context, begin, std::min(begin + loop.step, loop.n), thread);
  }
}

}  // namespace

bool has_openmp() noexcept { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }

void parallel_for(int64_t n, int64_t grain, int threads, void* context, Task task) noexcept {
  if (n <= 0) return;
  (void)at_fork;
  const int64_t grains = (n + grain - 1) / grain;
  if (!has_openmp() || forked) threads = 1;
  threads = static_cast<int>(std::min<int64_t>(threads, grains));
  // Exact sums carry at the end of a range; they hold 2^30 additions (core/exact_sum.h).
  constexpr int64_t kMostAdditions = int64_t{1} << 30;
  const int64_t longest = std::max<int64_t>(kMostAdditions / grain, 1) * grain;
  if (threads <= 1) {
    const DefaultEnvironment environment;
    for (int64_t begin = 0; begin < n; begin += longest)
      task(context, begin, std::min(begin + longest, n), 0);
    return;
  }
  // A few ranges a thread: enough to even out rows that cost nothing and threads that were
  // descheduled.
  constexpr int kRangesPerThread = 8;
  const int64_t ranges = std::min<int64_t>(grains, int64_t{threads} * kRangesPerThread);
  Loop loop{n, std::min((grains + ranges - 1) / ranges * grain, longest), context, task};
  GOMP_parallel([](void* p) { work(*static_cast<Loop*>(p), omp_get_thread_num()); }, &loop,
                static_cast<unsigned>(threads), 0);
}

}  // namespace mbk
