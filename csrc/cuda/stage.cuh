#pragma once
// Where a team's block of the next row waits, in shared memory: copied there while the present row
// is computed, by the bulk copy engine, or before sm_90 by asynchronous copies of the threads.
#include "cuda/packed.cuh"
#include "cuda/team.cuh"

namespace mbk::MBK_ISA {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kBulkCopies = false;
#else
inline constexpr bool kBulkCopies = true;
#endif

template <class In>
struct Stage {
  typedef Compute<In> T;
  static constexpr size_t kBytes = kBlock * sizeof(In);  // of a team, behind the barriers of all

  unsigned char* const memory;

  MBK_DEVICE explicit Stage(unsigned char* shared) : memory(shared) {}

  MBK_DEVICE int team() const { return threadIdx.x / kTeam<T>; }
  MBK_DEVICE Barrier& arrived() const { return ((Barrier*)memory)[team()]; }
  MBK_DEVICE In* block() const {  // kBlock columns
    const size_t barriers = (blockDim.x / kTeam<T> * sizeof(Barrier) + 127) / 128 * 128;
    return (In*)(memory + barriers + team() * kBytes);
  }

  // By all threads; a barrier of the block must follow.
  MBK_DEVICE void begin() const {
    if (kBulkCopies && threadIdx.x % kTeam<T> == 0) arrived().init(1);
  }
  // By the whole warp, after which the team's threads do not read what the stage held. Rows are
  // multiples of 16 bytes, aligned.
  MBK_DEVICE void load(const In* from, int columns) {
    __syncwarp(kWholeWarp);
    const unsigned bytes = columns * sizeof(In);
    if constexpr (kBulkCopies) {
      if (threadIdx.x % kTeam<T> == 0 && bytes) {
        arrived().arrive_expect(bytes);
        bulk_load(block(), from, bytes, &arrived());
      }
    } else {
      for (unsigned at = threadIdx.x % kTeam<T> * 16; at < bytes; at += kTeam<T> * 16)
        async_load((char*)block() + at, (const char*)from + at);
      async_commit();
    }
  }
  // By the whole warp, before the team's threads read what was loaded; the team's load number
  // `round`.
  MBK_DEVICE void wait(int columns, int round) {
    if constexpr (kBulkCopies) {
      if (columns) arrived().wait(round % 2);
    } else {
      async_wait<0>();
      __syncwarp(kWholeWarp);
    }
  }
  // -inf for a column of the row, in place of what was loaded; by the thread that reads it, whose
  // part begins at `first`.
  MBK_DEVICE void hide(int64_t first, int64_t column) {
    const int64_t away = column - first;
    if (away < 0 || away >= kBlock || away % kGroup >= kRun<T>) return;
    block()[away + threadIdx.x % kTeam<T> * kRun<T>] = narrow<In>(-(T)__builtin_inff());
    if constexpr (kBulkCopies) fence_async();  // the next copy comes after it
  }
  MBK_DEVICE Packed<In> step(int s) const {
    return *(const Packed<In>*)(block() + s * kGroup + threadIdx.x % kTeam<T> * kRun<T>);
  }
};

}  // namespace mbk::MBK_ISA
