#pragma once
// Parallel loops on the threads of the OpenMP runtime that torch has loaded.
#include <stdint.h>

namespace mbk {

using Task = void (*)(void* context, int64_t begin, int64_t end, int thread);

// Calls task for disjoint ranges that cover [0, n), on at most `threads` threads (thread <
// threads), in the default floating-point environment. Ranges are multiples of `grain` long, but
// for the last. Which thread gets which range is not defined: the result must not depend on it.
void parallel_for(int64_t n, int64_t grain, int threads, void* context, Task task) noexcept;

// The same for a function object; per-ISA code may use it, since it leaves no symbol behind.
template <class F>
inline __attribute__((always_inline)) void parallel_for(int64_t n, int64_t grain, int threads,
                                                        F& body) {
  parallel_for(n, grain, threads, &body, [](void* context, int64_t begin, int64_t end, int thread) {
    (*static_cast<F*>(context))(begin, end, thread);
  });
}

bool has_openmp() noexcept;

}  // namespace mbk
