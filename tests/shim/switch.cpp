#include "switch.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl shim_switch_stack
.hidden shim_switch_stack
.type shim_switch_stack, @function
shim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch_stack, .-shim_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl shim_switch_stack
.hidden shim_switch_stack
.type shim_switch_stack, %function
shim_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size shim_switch_stack, .-shim_switch_stack
)");
#endif

// Saves the registers that a call must keep on the current stack, and goes on on the other one.
extern "C" void shim_switch_stack(void** from, void* to);

namespace shim {
namespace {

constexpr size_t kGuard = 65536, kBytes = 65536, kTogether = 64;  // pages may have 64 KB

}  // namespace

// The address sanitizer must know which stack is in use, and that nothing is left on a fresh one.
#if defined(__SANITIZE_ADDRESS__)

void switch_stack(Stack* from, const Stack& to) {
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.bytes);
  shim_switch_stack(&from->pointer, to.pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
void arrive_on_fresh_stack() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
Stack thread_stack() {
  pthread_attr_t attributes;
  void* bottom;
  size_t bytes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &bytes);
  pthread_attr_destroy(&attributes);
  return {nullptr, (char*)bottom, bytes};
}

#else

void switch_stack(Stack* from, const Stack& to) { shim_switch_stack(&from->pointer, to.pointer); }
void arrive_on_fresh_stack() {}
Stack thread_stack() { return {}; }
#define ASAN_UNPOISON_MEMORY_REGION(bottom, bytes) ((void)(bottom))

#endif

void StackPool::grow(size_t count) {
  while (bottoms_.size() < count) {
    void* const memory = mmap(nullptr, kTogether * (kGuard + kBytes), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kTogether; ++i) {
      char* const guard = (char*)memory + i * (kGuard + kBytes);
      mprotect(guard, kGuard, PROT_NONE);
      bottoms_.push_back(guard + kGuard);
    }
  }
}

Stack StackPool::fresh(size_t i, void (*entry)()) const {
#if defined(__x86_64__)
  constexpr size_t kSaved = 64, kEntry = 48;  // six registers, then the address to return to
#else
  constexpr size_t kSaved = 160, kEntry = 88;  // x30
#endif
  ASAN_UNPOISON_MEMORY_REGION(bottoms_[i], kBytes);
  char* const saved = bottoms_[i] + kBytes - kSaved;
  memset(saved, 0, kSaved);
  memcpy(saved + kEntry, &entry, sizeof entry);
  return {saved, bottoms_[i], kBytes};
}

}  // namespace shim
