#pragma once
// What the scheduler knows of the threads, warps, blocks and clusters that are under way.
#include <memory>
#include <vector>

#include "fibres.h"
#include "races.h"
#include "switch.h"

namespace shim {

inline constexpr char kEnded[] = "ended", kClusterWait[] = "cluster_wait";
inline constexpr unsigned char kCanary = 0xa5;
inline constexpr int kCanaryBytes = 1024;

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned group;
  std::shared_ptr<races::Tag> done;
};
struct Copies {  // of one thread, in groups
  std::vector<Copy> pending;
  unsigned group;
};
struct Stored {  // on its way to global memory
  void* to;
  std::vector<char> data;
};

struct Fibre {
  Stack stack;
  unsigned number;  // in the order
  uint3 thread;
  Block* block;
  Warp* warp;
  const char* state;  // for the report: what it waits for
  Where where;
  unsigned mask;  // of the warp's lanes it waits for
  // A warp's exchange: what the thread brought, whose value it wants, what it got.
  uint64_t value, result;
  unsigned source;
  bool arrived;    // at the cluster's barrier, and has not yet waited
  unsigned phase;  // of the cluster's barrier when it arrived
  Copies loads, stores;
  std::vector<Stored> stored;
  bool fenced;  // since the last group of stores
  // What its last __threadfence covers; what its atomics have met and the next one lets it see;
  // what came before the copies that it has issued.
  races::Tag fence, met, issued;
};

// Tags alternate from phase to phase: nobody is two phases ahead of another.
struct Barrier {
  unsigned arrived, phase;
  races::Tag tags[2];
  bool any, result;
  const char* name;
  Where where;
};

// The lanes of one mask on their way to one operation, kept at the place of its lowest lane.
struct Gathering {
  unsigned mask, arrived, phase;
  races::Tag tags[2];
  const char* name;
};
struct Warp {
  unsigned claimed;  // the lanes in the masks of all that gather
  Gathering gatherings[32];
};

// A Barrier of csrc/cuda/platform.cuh: a phase is over when all have arrived, and all bytes.
struct PhaseBarrier {
  void* address;
  unsigned arrivals, missing, phase;
  int64_t bytes;
  races::Tag tags[2];
  std::vector<Copy> loads;
  std::vector<unsigned> waiting;
};

struct Cluster {
  unsigned arrived, phase;
  races::Tag tags[2];
};

struct Block {
  uint3 index;
  Cluster* cluster;
  unsigned rank;
  unsigned number;  // among those under way
  unsigned threads, live;
  bool started;
  char* shared;
  size_t shared_bytes;
  Barrier barrier;
  Fibre* first;
  std::vector<Warp> warps;
  std::vector<PhaseBarrier> phase_barriers;
  races::Tag begun, ended;
};

extern Fibre* current;

// The calling thread waits until somebody wakes it; any thread may be made runnable, itself too.
void wait_here(const char* state, Where where);
void wake(unsigned number);

}  // namespace shim
