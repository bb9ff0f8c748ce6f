#include "fibres.h"

#include <string.h>

#include <mutex>
#include <string>
#include <vector>

#include "copies.h"
#include "core/environment.h"
#include "order.h"
#include "report.h"
#include "state.h"
#include "switch.h"

namespace shim {

Fibre* current = nullptr;  // of the thread that holds the lock

namespace {

std::mutex one_launch;
StackPool stacks;
const Launch* launch_under_way;
Ready ready;
Stack scheduler;
std::vector<Fibre> fibres;
std::vector<Block> blocks;
std::vector<Cluster> clusters;
std::string failure;  // not empty: the launch is given up

// The next runnable thread, or the scheduler if there is none.
void run_next() {
  Fibre* const self = current;
  const int next = failure.empty() ? ready.take() : -1;
  if (next < 0) {
    current = nullptr;
    races::run_host();
    switch_stack(&self->stack, scheduler);
  } else if (&fibres[next] != self) {
    current = &fibres[next];
    races::run_thread(current->number);
    switch_stack(&self->stack, current->stack);
  }
}

void poison(Block& block) {
  memset(block.shared, 0xff, block.shared_bytes);
  memset(block.shared + block.shared_bytes, kCanary, kCanaryBytes);
}

void end_block(Block& block) {
  races::see(&block.ended);
  for (const PhaseBarrier& b : block.phase_barriers) {
    if (!b.loads.empty()) {
      fault("the block ends before its bulk loads have arrived", launch_under_way->where);
    }
  }
  for (int i = 0; i < kCanaryBytes; ++i) {
    if ((unsigned char)block.shared[block.shared_bytes + i] != kCanary) {
      fault("the block has written behind its shared memory", launch_under_way->where);
    }
  }
  poison(block);
}

void check_races(Where where) {
  if (races::found()) fault("a data race, reported above", where);
}

// What a fibre's stack begins with.
void thread_main() {
  arrive_on_fresh_stack();
  Block& block = *current->block;
  if (!block.started) {
    block.started = true;
    poison(block);
    races::publish(&block.begun);
  }
  races::see(&block.begun);
  current->state = "running";
  launch_under_way->run(*launch_under_way);
  end_copies();
  check_races(launch_under_way->where);
  current->state = kEnded;
  races::publish(&block.ended);
  if (--block.live == 0) end_block(block);
  run_next();
  __builtin_unreachable();
}

void prepare(const Launch& launch, const Order& order, unsigned first, unsigned count) {
  const unsigned padded = (launch.threads + 31) / 32 * 32, cluster = launch.cluster;
  ready.reset(count * cluster * padded, order);
  for (unsigned c = 0; c < count; ++c) {
    clusters[c] = Cluster{};
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& block = blocks[c * cluster + rank];
      block.index = {order.cluster(first + c) * cluster + rank, 0, 0};
      block.cluster = &clusters[c];
      block.rank = rank;
      block.live = launch.threads;
      block.started = false;
      block.barrier = Barrier{};
      block.phase_barriers.clear();
      for (Warp& warp : block.warps) warp = Warp{};
      for (unsigned t = 0; t < launch.threads; ++t) {
        const unsigned number = (c * cluster + rank) * padded + t;
        Fibre& fibre = fibres[number];
        fibre = Fibre{};
        fibre.number = number;
        fibre.thread = {t, 0, 0};
        fibre.block = &block;
        fibre.warp = &block.warps[t / 32];
        fibre.state = "not started";
        fibre.stack = stacks.fresh(number, thread_main);
        ready.add(number);
      }
    }
  }
}

// Clusters first ... first + count of the order, all of them under way at once.
void run_clusters(const Launch& launch, const Order& order, unsigned first, unsigned count) {
  prepare(launch, order, first, count);
  current = &fibres[ready.take()];
  races::start_launch(fibres.size(), blocks.size());
  races::run_thread(current->number);
  switch_stack(&scheduler, current->stack);
  bool ended = true;
  for (unsigned b = 0; b < count * launch.cluster; ++b) ended = ended && blocks[b].live == 0;
  if (failure.empty() && !ended) failure = "every thread waits, or has ended";
  races::end_launch();
  if (failure.empty()) return;
  const std::string what = failure;
  failure.clear();
  throw Fault(report(what, launch, order.text(), blocks.data(), count * launch.cluster));
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const mbk::DefaultEnvironment environment;
  const unsigned all = launch.blocks / launch.cluster;
  const Order order = Order::from_environment(all);
  const unsigned padded = (launch.threads + 31) / 32 * 32;
  const unsigned at_once = races::kOn ? all : order.clusters_at_once(launch.cluster * padded);
  const size_t bytes = (launch.shared_bytes + kCanaryBytes + 127) / 128 * 128;
  std::vector<char> shared(at_once * launch.cluster * bytes + 128);
  char* const aligned = shared.data() + (128 - (uintptr_t)shared.data() % 128) % 128;
  launch_under_way = &launch;
  scheduler = thread_stack();
  clusters.assign(at_once, {});
  blocks.assign(at_once * launch.cluster, {});
  fibres.assign(blocks.size() * padded, {});
  if (fibres.size() + blocks.size() * races::kWorks > races::kMaxThreads)
    throw Fault("CUDA shim: too many threads to find races");
  stacks.grow(fibres.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    blocks[b].shared = aligned + b * bytes;
    blocks[b].shared_bytes = launch.shared_bytes;
    blocks[b].number = (unsigned)b;
    blocks[b].threads = launch.threads;
    blocks[b].first = &fibres[b * padded];
    blocks[b].warps.resize(padded / 32);
  }
  for (unsigned first = 0; first < all; first += at_once) {
    run_clusters(launch, order, first, first + at_once > all ? all - first : at_once);
  }
}

void wake(unsigned number) { ready.add(number); }
void wait_here(const char* state, Where where) {
  current->state = state;
  current->where = where;
  check_races(where);
  run_next();
  current->state = "running";
}

void fault(const char* what, Where where) {
  failure = std::string(what) + " (" + describe(*current, where) + ")";
  run_next();
  __builtin_unreachable();
}

const uint3& thread_index() { return current->thread; }
const uint3& block_index() { return current->block->index; }
const dim3& block_size() {
  static dim3 size;
  size = dim3(launch_under_way->threads);
  return size;
}
const dim3& grid_size() {
  static dim3 size;
  size = dim3(launch_under_way->blocks);
  return size;
}
#if defined(MBKERN_SHIM_RACES)
// A fence covers what its thread does next to the atomic: the atomic publishes what came before the
// last fence, and the next fence sees what the atomic has met.
void order_atomic(void* address) {
  races::Tag* const tag = (races::Tag*)address;
  Fibre* const self = current;
  const races::Agent agent(races::kAtomic, self->block->number);
  races::see(tag);
  races::publish(&self->met);
  races::see(&self->fence);
  races::publish(tag);
}
void order_fence() {
  races::see(&current->met);
  races::publish(&current->fence);
}
#endif

void* shared_memory() { return current->block->shared; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return launch_under_way->cluster; }

void* shared_memory_of(unsigned rank, const void* mine, Where where) {
  const size_t offset = (size_t)((const char*)mine - current->block->shared);
  if (offset > current->block->shared_bytes) fault("not an address of shared memory", where);
  if (rank >= launch_under_way->cluster) fault("no block of that rank in the cluster", where);
  return (current->block - current->block->rank + rank)->shared + offset;
}

}  // namespace shim
