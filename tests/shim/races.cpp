#include "races.h"

#if defined(MBKERN_SHIM_RACES)

#include <sanitizer/tsan_interface.h>

#include <vector>

static int reports = 0;

extern "C" {
// Of the sanitizer, declared in none of its headers.
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* from, size_t bytes);
// Called by it.
__attribute__((visibility("default"))) void __tsan_on_report(void*) { ++reports; }
__attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "report_thread_leaks=0:suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0:"
         "atexit_sleep_ms=0";
}
}

namespace shim::races {
namespace {

void* host;
struct Fibers {
  std::vector<void*> all;
  size_t count;  // in this launch
} threads, agents;
Tag launch_begins, launch_ends;
int reports_before;

void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }

template <class Action>
void each(const Fibers& fibers, Action action) {
  for (size_t i = 0; i < fibers.count; ++i) {
    switch_to(fibers.all[i]);
    action();
  }
  switch_to(host);
}

}  // namespace

void publish(Tag* tag) { __tsan_release(tag); }
void see(Tag* tag) { __tsan_acquire(tag); }

void start_launch(size_t thread_count, size_t blocks) {
  host = __tsan_get_current_fiber();
  threads.count = thread_count;
  agents.count = blocks * kWorks;
  publish(&launch_begins);
  for (Fibers* const f : {&threads, &agents}) {
    while (f->all.size() < f->count) f->all.push_back(__tsan_create_fiber(0));
    each(*f, [] { see(&launch_begins); });
  }
  reports_before = reports;
}

// Threads that were given up are used again: for the sanitizer in the middle of some functions,
// which only lengthens the stacks that it prints.
void end_launch() {
  for (const Fibers* const f : {&threads, &agents}) each(*f, [] { publish(&launch_ends); });
  see(&launch_ends);
}

void run_thread(size_t number) { switch_to(threads.all[number]); }
void run_host() { switch_to(host); }
Agent::Agent(Work work, size_t block) : self_(__tsan_get_current_fiber()) {
  switch_to(agents.all[block * kWorks + work]);
}
Agent::~Agent() { switch_to(self_); }
Quiet::Quiet() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Quiet::~Quiet() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
void read(const void* from, size_t bytes) { __tsan_read_range((void*)from, bytes); }
int found() { return reports - reports_before; }

}  // namespace shim::races

#endif
