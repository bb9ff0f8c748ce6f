#include "switch.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

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

namespace shim {

StackPointer new_stack(char* top, void (*entry)()) {
#if defined(__x86_64__)
  constexpr size_t kSaved = 64, kEntry = 48;  // six registers, then the address to return to
#else
  constexpr size_t kSaved = 160, kEntry = 88;  // x30
#endif
  memset(top - kSaved, 0, kSaved);
  memcpy(top - kSaved + kEntry, &entry, sizeof entry);
  return top - kSaved;
}

void StackPool::grow(size_t count) {
  constexpr size_t kGuard = 65536, kBytes = 65536, kTogether = 64;  // pages may have 64 KB
  while (tops_.size() < count) {
    void* const memory = mmap(nullptr, kTogether * (kGuard + kBytes), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kTogether; ++i) {
      char* const guard = (char*)memory + i * (kGuard + kBytes);
      mprotect(guard, kGuard, PROT_NONE);
      tops_.push_back(guard + kGuard + kBytes);
    }
  }
}

}  // namespace shim
