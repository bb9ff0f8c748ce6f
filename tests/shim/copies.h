#pragma once
// Asynchronous copies, as late as the rules allow. The destination of a copy is all ones from the
// moment it is issued; a load reads its source and arrives only when somebody waits for it, a store
// reads its source when its thread waits, and arrives when that thread ends.
#include "fibres.h"

namespace shim {

// A barrier of phases in shared memory, known by its address.
void barrier_init(void* barrier, unsigned arrivals, Where where);
void barrier_arrive(void* barrier, unsigned bytes, Where where);
void barrier_wait(void* barrier, unsigned parity, Where where);

void bulk_load(void* to, const void* from, unsigned bytes, void* barrier, Where where);
void bulk_store(void* to, const void* from, unsigned bytes, Where where);
void bulk_commit();
void bulk_wait(unsigned groups_left);
void fence_async();

void async_load(void* to, const void* from, Where where);
void async_commit();
void async_wait(unsigned groups_left);

// The current thread ends.
void end_copies();

}  // namespace shim
