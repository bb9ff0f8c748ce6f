#pragma once
// Threads of a CUDA launch as fibres of one thread of the CPU: what the stand-in headers call.
//
// Every thread runs until it must wait for others: at a barrier, in a warp's exchange. Which of the
// runnable threads goes next is the order (MBKERN_SHIM_ORDER, read at each launch): "ascending" the
// lowest one, "descending" the highest, "random:<seed>" any, with several clusters of the grid
// under way at once. A kernel whose barriers are complete gives the same bits in each of them.
// Shared memory is all ones (NaN) when a block starts and again when it has ended.
//
// What can only be a fault ends the launch with an exception of type Fault, whose text says what
// every thread of the blocks under way was doing.
#include <stddef.h>
#include <stdint.h>

#include <stdexcept>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace shim {

class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the kernel's source a thread waits; the defaults are those of the caller.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define SHIM_WHERE ::shim::Where where = ::shim::Where::here()

struct Launch {
  void (*run)(const Launch&);  // one thread: kernel(params)
  void (*kernel)();
  const void* params;
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
  const char* name;
  Where where;
};
// Runs the whole grid; throws Fault. What the device could not run is the caller's to refuse.
void run(const Launch& launch);

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();

// The calling block's shared memory, and the same place in that of another block of its cluster.
void* shared_memory();
void* shared_memory_of(unsigned rank, const void* mine, Where where);
unsigned cluster_rank();
unsigned cluster_size();

// Waits for all threads of the block; true if any of them passed true.
bool block_barrier(const char* name, bool predicate, Where where);

// The halves of a cluster's barrier. Every thread of the cluster calls both, in turn.
void cluster_arrive(Where where);
void cluster_wait(Where where);

// One step of a warp: waits for the lanes in `mask`, of which the caller must be one, all of them
// at the same operation; then each gets the value that lane `source` brought.
uint64_t warp_exchange(const char* name, unsigned mask, uint64_t value, unsigned source,
                       Where where);
// The same for a vote: the lanes whose value is not zero.
unsigned warp_ballot(const char* name, unsigned mask, bool value, Where where);
void warp_barrier(const char* name, unsigned mask, Where where);

// For the race detector (races.h): around each atomic, and a __threadfence.
#if defined(MBKERN_SHIM_RACES)
void order_atomic(void* address);
void order_fence();
#else
inline void order_atomic(void*) {}
inline void order_fence() {}
#endif

// Ends the launch: the calling thread has made a mistake.
[[noreturn]] void fault(const char* what, Where where);

}  // namespace shim
