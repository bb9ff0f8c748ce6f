#pragma once
// A race detector for kernels: ThreadSanitizer, told that every thread of a launch is a thread of
// its own, and which of CUDA's operations order memory: barriers of a block, a cluster or a phase,
// __syncwarp, and __threadfence around an atomic; shuffles and votes do not. With MBKERN_SHIM_RACES
// the kernels (not the shim) are compiled with -fsanitize=thread; without, all of this is nothing.
// The whole grid is then under way at once, so that no two threads share a stack or shared memory.
#include <stddef.h>
#include <stdint.h>

namespace shim::races {

// Names an order: what a thread has done before publish() is seen by who calls see() afterwards.
typedef uint64_t Tag;

enum Work { kLoad, kStore, kAtomic, kWorks };

#if defined(MBKERN_SHIM_RACES)

inline constexpr bool kOn = true;
inline constexpr size_t kMaxThreads = 8000;  // with the agents; the sanitizer knows 8192

void start_launch(size_t threads, size_t blocks);
void end_launch();
void run_thread(size_t number);  // right before the step to its stack
void run_host();
void publish(Tag* tag);
void see(Tag* tag);
// What the current thread does meanwhile is done by somebody else: whoever copies asynchronously. A
// block has one for each kind of work.
class Agent {
 public:
  Agent(Work work, size_t block);
  ~Agent();
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

 private:
  void* self_;
};
// What the current thread does meanwhile is the shim's own business.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};
// A read of a kernel's memory (a write is memset's or memcpy's, which the sanitizer knows).
void read(const void* from, size_t bytes);
int found();  // since the launch began

#else

inline constexpr bool kOn = false;
inline constexpr size_t kMaxThreads = SIZE_MAX;

inline void start_launch(size_t, size_t) {}
inline void end_launch() {}
inline void run_thread(size_t) {}
inline void run_host() {}
inline void publish(Tag*) {}
inline void see(Tag*) {}
struct Agent {
  Agent(Work, size_t) {}
};
struct Quiet {
  Quiet() {}
};
inline void read(const void*, size_t) {}
inline int found() { return 0; }

#endif

}  // namespace shim::races
