#include "shim_run.h"

#include <stdlib.h>

namespace test {
namespace {

bool is_race(const std::string& fault) { return fault.find("data race") != std::string::npos; }

}  // namespace

Outcome run(void (*kernel)(Params), unsigned blocks, unsigned threads, unsigned cluster, int n,
            size_t shared_bytes) {
  std::vector<float> x(blocks * std::max(threads, (unsigned)n)), y(x.size() + 1);
  for (unsigned i = 0; i < x.size(); ++i) x[i] = input(i);
  unsigned ticket = 0;
  try {
    const cudaError_t error = launch(kernel, Params{x.data(), y.data(), &ticket, n}, blocks,
                                     threads, cluster, shared_bytes, nullptr);
    CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
    CHECK(ticket == 0, "the ticket is %u", ticket);
  } catch (const shim::Fault& fault) {
    return {{}, fault.what()};
  }
  return {y, ""};
}
Outcome run(void (*kernel)(Params), unsigned cluster, int n) {
  return run(kernel, kBlocks, kThreads, cluster, n, kSharedBytes);
}

std::set<Outcome> outcomes(const std::function<Outcome()>& f) {
  std::set<Outcome> all;
  for (const char* const order : kOrders) {
    setenv("MBKERN_SHIM_ORDER", order, 1);
    all.insert(f());
    ++launches;
  }
  return all;
}

void check_right(const char* name, const std::function<Outcome()>& f,
                 const std::function<double(unsigned)>& want, unsigned count) {
  const auto all = outcomes(f);
  CHECK(all.size() == 1, "%s: %zu different results", name, all.size());
  const Outcome& outcome = *all.begin();
  CHECK(outcome.fault.empty(), "%s: %s", name, outcome.fault.c_str());
  for (unsigned i = 0; i < count && i < outcome.y.size(); ++i) {
    CHECK(outcome.y[i] == want(i), "%s: y[%u] is %g, not %g", name, i, outcome.y[i], want(i));
  }
}

void check_wrong(const char* name, const std::function<Outcome()>& f,
                 const std::function<double(unsigned)>& want, unsigned count) {
  bool right = true;
  for (const Outcome& outcome : outcomes(f)) {
    if (shim::races::kOn) {
      CHECK(is_race(outcome.fault), "%s: no race seen, %s", name, outcome.fault.c_str());
      continue;
    }
    CHECK(outcome.fault.empty(), "%s: %s", name, outcome.fault.c_str());
    for (unsigned i = 0; i < count; ++i) right = right && outcome.y[i] == want(i);
  }
  CHECK(!right || shim::races::kOn, "%s: not seen", name);
}

void check_fault(const char* name, void (*kernel)(Params), const std::vector<const char*>& texts,
                 unsigned cluster, int n) {
  for (const char* const order : kOrders) {
    setenv("MBKERN_SHIM_ORDER", order, 1);
    const std::string fault = run(kernel, cluster, n).fault;
    ++launches;
    if (shim::races::kOn && is_race(fault)) continue;
    for (const char* const text : texts) {
      CHECK(fault.find(text) != std::string::npos, "%s, order %s: no \"%s\" in \"%s\"", name, order,
            text, fault.c_str());
    }
  }
}

}  // namespace test
