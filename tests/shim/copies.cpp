#include "copies.h"

#include <string.h>

#include <algorithm>

#include "state.h"

namespace shim {
namespace {

bool in_shared_memory(const void* p, size_t bytes) {
  const Block& block = *current->block;
  const size_t offset = (size_t)((const char*)p - block.shared);
  return offset <= block.shared_bytes && bytes <= block.shared_bytes - offset;
}

// What every copy must obey; `shared` is its end in shared memory.
void check_copy(const void* to, const void* from, const void* shared, unsigned bytes, Where where) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) % 16) fault("a copy is not aligned to 16", where);
  if (!in_shared_memory(shared, bytes)) fault("a copy is not within shared memory", where);
}

// A copy is done by somebody else, after what its thread did before it, at any time until it is
// known to be done. To see races it has happened at once; its data comes in perform().
void issue(void* to, const void* from, unsigned bytes, races::Work work, races::Tag* done) {
  races::publish(&current->issued);
  const races::Agent agent(work, current->block->number);
  races::see(&current->issued);
  races::read(from, bytes);
  memset(to, 0xff, bytes);
  races::publish(done);
}

void perform(std::vector<Copy>& copies) {
  const races::Quiet quiet;
  for (const Copy& copy : copies) memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

PhaseBarrier& find(void* barrier, Where where) {
  for (PhaseBarrier& b : current->block->phase_barriers) {
    if (b.address == barrier) return b;
  }
  fault("a Barrier that has not been initialised", where);
}

// Loads arrive once all threads have, if there is anybody to see it.
void advance(PhaseBarrier& b) {
  if (b.missing || b.waiting.empty()) return;
  for (const Copy& load : b.loads) b.bytes -= (int64_t)load.bytes;
  perform(b.loads);
  if (b.bytes) return;  // other than expected: it never completes
  ++b.phase;
  b.missing = b.arrivals;
  for (const unsigned number : b.waiting) wake(number);
  b.waiting.clear();
}

void add(Copies& copies, void* to, const void* from, unsigned bytes, races::Work work) {
  const auto done = std::make_shared<races::Tag>();
  issue(to, from, bytes, work, done.get());
  const races::Quiet quiet;
  copies.pending.push_back({to, from, bytes, copies.group, done});
}

// Takes the copies out of `from` that do not belong to the latest groups: they are done.
std::vector<Copy> take_old(Copies& from, unsigned groups_left) {
  const races::Quiet quiet;
  std::vector<Copy> old;
  const auto is_old = [&](const Copy& c) { return c.group + groups_left < from.group; };
  std::copy_if(from.pending.begin(), from.pending.end(), std::back_inserter(old), is_old);
  from.pending.erase(std::remove_if(from.pending.begin(), from.pending.end(), is_old),
                     from.pending.end());
  for (const Copy& copy : old) races::see(copy.done.get());
  return old;
}

}  // namespace

void barrier_init(void* barrier, unsigned arrivals, Where where) {
  if (!in_shared_memory(barrier, 8)) fault("a Barrier is not within shared memory", where);
  if (arrivals == 0) fault("a Barrier of no arrivals", where);
  for (const PhaseBarrier& b : current->block->phase_barriers) {
    if (b.address == barrier) fault("a Barrier is initialised twice", where);
  }
  const races::Quiet quiet;
  current->block->phase_barriers.push_back({barrier, arrivals, arrivals, 0, 0, {}, {}, {}});
}

void barrier_arrive(void* barrier, unsigned bytes, Where where) {
  PhaseBarrier& b = find(barrier, where);
  if (b.missing == 0) fault("arrives at a Barrier whose phase nobody has waited for", where);
  b.bytes += bytes;
  --b.missing;
  races::publish(&b.tags[b.phase % 2]);
  // The phase of a barrier without loads is over even if nobody has waited for it.
  if (b.missing == 0 && b.bytes == 0 && b.loads.empty() && b.waiting.empty()) {
    ++b.phase;
    b.missing = b.arrivals;
  }
  advance(b);
}

void barrier_wait(void* barrier, unsigned parity, Where where) {
  PhaseBarrier& b = find(barrier, where);
  if (parity > 1) fault("a parity is 0 or 1", where);
  if ((b.phase & 1) == parity) {
    {
      const races::Quiet quiet;
      b.waiting.push_back(current->number);
    }
    advance(b);
    wait_here("Barrier::wait", where);
  }
  races::see(&b.tags[parity]);
}

void bulk_load(void* to, const void* from, unsigned bytes, void* barrier, Where where) {
  check_copy(to, from, to, bytes, where);
  PhaseBarrier& b = find(barrier, where);
  issue(to, from, bytes, races::kLoad, &b.tags[b.phase % 2]);
  const races::Quiet quiet;
  b.loads.push_back({to, from, bytes, 0, nullptr});
}

void bulk_store(void* to, const void* from, unsigned bytes, Where where) {
  check_copy(to, from, from, bytes, where);
  if (!current->fenced) fault("a bulk_store without a fence_async before it", where);
  add(current->stores, to, from, bytes, races::kStore);
}

void bulk_commit() {
  ++current->stores.group;
  current->fenced = false;
}

// The sources have been read, which is all that is known: the data is on its way.
void bulk_wait(unsigned groups_left) {
  const races::Quiet quiet;
  for (const Copy& store : take_old(current->stores, groups_left)) {
    const char* const from = (const char*)store.from;
    current->stored.push_back({store.to, std::vector<char>(from, from + store.bytes)});
  }
}

void fence_async() { current->fenced = true; }

void async_load(void* to, const void* from, Where where) {
  check_copy(to, from, to, 16, where);
  add(current->loads, to, from, 16, races::kLoad);
}
void async_commit() { ++current->loads.group; }
void async_wait(unsigned groups_left) {
  std::vector<Copy> old = take_old(current->loads, groups_left);
  perform(old);
}

void end_copies() {
  if (!current->stores.pending.empty()) {
    fault("the thread ends before its bulk stores have read shared memory", current->where);
  }
  const races::Quiet quiet;
  perform(current->loads.pending);
  for (const Stored& s : current->stored) memcpy(s.to, s.data.data(), s.data.size());
}

}  // namespace shim
