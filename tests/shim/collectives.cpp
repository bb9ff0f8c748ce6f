// Where threads wait for each other.
#include "state.h"

namespace shim {
namespace {

bool same(const char* a, const char* b) { return a == b || !__builtin_strcmp(a, b); }
bool same(Where a, Where b) { return a.line == b.line && same(a.file, b.file); }

}  // namespace

bool block_barrier(const char* name, bool predicate, Where where) {
  Block& block = *current->block;
  Barrier& barrier = block.barrier;
  if (barrier.arrived == 0) {
    barrier.any = false;
    barrier.name = name;
    barrier.where = where;
  } else if (!same(barrier.name, name) || !same(barrier.where, where)) {
    fault("threads of one block meet at different barriers", where);
  }
  barrier.any = barrier.any || predicate;
  races::Tag* const tag = &barrier.tags[barrier.phase % 2];
  races::publish(tag);
  if (++barrier.arrived == block.threads) {
    barrier.arrived = 0;
    ++barrier.phase;
    barrier.result = barrier.any;
    for (unsigned t = 0; t < block.threads; ++t) wake(block.first[t].number);
  }
  wait_here(name, where);
  races::see(tag);
  return barrier.result;
}

void cluster_arrive(Where where) {
  Cluster& cluster = *current->block->cluster;
  if (current->arrived) fault("arrives at the cluster's barrier twice without a wait", where);
  current->arrived = true;
  current->phase = cluster.phase;
  races::publish(&cluster.tags[cluster.phase % 2]);
  if (++cluster.arrived < cluster_size() * current->block->threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  Block* const first = current->block - current->block->rank;
  for (unsigned b = 0; b < cluster_size(); ++b) {
    for (unsigned t = 0; t < first[b].threads; ++t) {
      if (first[b].first[t].state == kClusterWait) wake(first[b].first[t].number);
    }
  }
}

void cluster_wait(Where where) {
  if (!current->arrived) fault("waits at the cluster's barrier without having arrived", where);
  Cluster& cluster = *current->block->cluster;
  if (current->phase != cluster.phase) wake(current->number);
  wait_here(kClusterWait, where);
  races::see(&cluster.tags[current->phase % 2]);
  current->arrived = false;
}

namespace {

// Waits for the lanes of the mask; the last one that arrives hands out the results.
template <class Result>
uint64_t gather(const char* name, unsigned mask, bool orders_memory, Where where, Result result) {
  Warp& warp = *current->warp;
  const unsigned lane = current->thread.x % 32;
  if (!(mask >> lane & 1)) fault("a lane outside of its own mask", where);
  Gathering& gathering = warp.gatherings[__builtin_ctz(mask)];
  if (gathering.arrived == 0) {
    if (warp.claimed & mask) fault("lanes of one warp have masks that overlap", where);
    warp.claimed |= mask;
    gathering.mask = mask;
    gathering.name = name;
  } else if (gathering.mask != mask) {
    fault("lanes of one warp have masks that overlap", where);
  } else if (!same(gathering.name, name)) {
    fault("lanes of one mask meet at different operations", where);
  }
  current->mask = mask;
  races::Tag* const tag = &gathering.tags[gathering.phase % 2];
  if (orders_memory) races::publish(tag);
  gathering.arrived |= 1u << lane;
  if (gathering.arrived == mask) {
    gathering.arrived = 0;
    ++gathering.phase;
    warp.claimed &= ~mask;
    Fibre* const lanes = current - lane;
    for (unsigned k = 0; k < 32; ++k) {
      if (!(mask >> k & 1)) continue;
      lanes[k].result = result(lanes, lanes[k]);
      wake(lanes[k].number);
    }
  }
  wait_here(name, where);
  if (orders_memory) races::see(tag);
  return current->result;
}

}  // namespace

uint64_t warp_exchange(const char* name, unsigned mask, uint64_t value, unsigned source,
                       Where where) {
  if (!(mask >> source & 1)) fault("takes the value of a lane outside of the mask", where);
  current->value = value;
  current->source = source;
  return gather(name, mask, false, where,
                [](const Fibre* lanes, const Fibre& self) { return lanes[self.source].value; });
}

unsigned warp_ballot(const char* name, unsigned mask, bool value, Where where) {
  current->value = value;
  return (unsigned)gather(name, mask, false, where, [mask](const Fibre* lanes, const Fibre&) {
    uint64_t votes = 0;
    for (unsigned k = 0; k < 32; ++k) {
      if (mask >> k & 1) votes |= lanes[k].value << k;
    }
    return votes;
  });
}

void warp_barrier(const char* name, unsigned mask, Where where) {
  gather(name, mask, true, where, [](const Fibre*, const Fibre&) { return uint64_t{0}; });
}

}  // namespace shim
