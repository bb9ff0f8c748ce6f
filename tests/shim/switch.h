#pragma once
// Stacks, and the step from one to another.
#include <stddef.h>

#include <vector>

namespace shim {

struct Stack {
  void* pointer;  // while nobody is on it
  char* bottom;
  size_t bytes;
};

// Goes on where `to` was left. What `from` does next begins where this returns.
void switch_stack(Stack* from, const Stack& to);
// The first thing on a stack that has been made by StackPool::fresh.
void arrive_on_fresh_stack();
// The stack of the calling thread of the CPU.
Stack thread_stack();

// Stacks are kept from launch to launch. Below each lies a page that cannot be touched.
class StackPool {
 public:
  void grow(size_t count);
  // Number i, that begins with `entry`, which never returns.
  Stack fresh(size_t i, void (*entry)()) const;

 private:
  std::vector<char*> bottoms_;
};

}  // namespace shim
