#pragma once
// Stacks, and the step from one to another.
#include <stddef.h>

#include <vector>

namespace shim {

typedef void* StackPointer;

// Saves the registers that a call must keep on the current stack and goes on where `to` was left.
extern "C" void shim_switch_stack(StackPointer* from, StackPointer to);
inline void switch_stack(StackPointer* from, StackPointer to) { shim_switch_stack(from, to); }

// A stack that begins with `entry`, which never returns.
StackPointer new_stack(char* top, void (*entry)());

// Stacks are kept from launch to launch. Below each lies a page that cannot be touched.
class StackPool {
 public:
  void grow(size_t count);
  char* top(size_t i) const { return tops_[i]; }

 private:
  std::vector<char*> tops_;
};

}  // namespace shim
