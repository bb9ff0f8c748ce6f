#pragma once
// What the groups of shim_test share: a toy kernel is run in every order of its threads, and its
// outcomes are compared.
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/platform.cuh"
#include "races.h"

namespace test {

using namespace mbk::cuda;

struct Params {
  const float* x;
  float* y;
  unsigned* ticket;
  int n;
};

// Races are found in any order, but slowly.
inline const std::vector<const char*> kOrders =
    shim::races::kOn
        ? std::vector<const char*>{"ascending", "random:1"}
        : std::vector<const char*>{"ascending", "descending", "random:1", "random:2", "random:3"};
inline constexpr unsigned kBlocks = 8, kThreads = 128, kSharedBytes = 2112;

inline float input(unsigned i) { return (float)(i * 37 % 101); }

inline int64_t launches = 0;

// y after one launch, or the text of its fault.
struct Outcome {
  std::vector<float> y;
  std::string fault;
  bool operator<(const Outcome& o) const {
    return y.size() != o.y.size() ? y.size() < o.y.size()
                                  : memcmp(y.data(), o.y.data(), y.size() * sizeof(float)) < 0;
  }
};

// x is input(), n numbers a block, but at least one a thread; y has one more, and is zeros.
Outcome run(void (*kernel)(Params), unsigned blocks, unsigned threads, unsigned cluster, int n,
            size_t shared_bytes);
Outcome run(void (*kernel)(Params), unsigned cluster = 1, int n = (int)kThreads);

// The different outcomes in all orders.
std::set<Outcome> outcomes(const std::function<Outcome()>& f);
// One outcome, and it is what `want` says for each y.
void check_right(const char* name, const std::function<Outcome()>& f,
                 const std::function<double(unsigned)>& want, unsigned count);
// More than one outcome, or one that is wrong: the fault shows in the results.
void check_wrong(const char* name, const std::function<Outcome()>& f,
                 const std::function<double(unsigned)>& want, unsigned count);
// Every order ends with a fault whose text has all of these.
void check_fault(const char* name, void (*kernel)(Params), const std::vector<const char*>& texts,
                 unsigned cluster = 1, int n = (int)kThreads);

void copies();

}  // namespace test
