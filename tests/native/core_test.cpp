// Tests of the core that need neither Python nor torch, made for sanitizers, other compilers and
// emulators.
//   core_test [--quick]
// Every tier that this processor supports is run; the digest covers the bits of all results and
// must be the same for every tier, compiler and machine. See core_test_*.cpp.
#include <chrono>
#include <thread>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

// In the module these names resolve to the OpenMP runtime that torch has loaded. This binary has
// none, so it brings the smallest one that can be: new threads for every region.
namespace {
thread_local int thread_number = 0, thread_count = 1;
}
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t)
    team.emplace_back([=] {
      thread_number = (int)t, thread_count = (int)threads;
      body(data);
    });
  for (std::thread& t : team) t.join();
}
int omp_get_thread_num() { return thread_number; }
int omp_get_num_threads() { return thread_count; }
}

// Of all results, and of those of --quick. They change with NUMERICS_VERSION and with these tests.
constexpr uint64_t kDigest = 0x49cc69424d0cf31d, kQuickDigest = 0xac22ac23762a8d28;

namespace test {

Digest& digest_of(size_t tier) {
  static std::vector<Digest> digests(mbk::available_backends().size());
  return digests[tier];
}

}  // namespace test

int main(int argc, char** argv) {
  test::Options options;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--quick") != 0) {
      fprintf(stderr, "core_test: unknown option %s; known: --quick\n", argv[i]);
      return 2;
    }
    options.quick = true;
  }
  struct Group {
    const char* name;
    int64_t (*run)(const test::Options&);
  };
  constexpr Group groups[] = {
      {"fma of the tier without hardware for it", test::numbers_fma},
      {"storage types, both ways", test::numbers_storage},
      {"exact sums", test::numbers_exact_sum},
      {"exact sums of few", test::numbers_sum_few},
      {"row losses", test::row_losses},
      {"row losses on several threads", test::row_threads},
#if defined(MBKERN_CUDA)
      {"row losses by the CUDA kernels", test::row_devices},
#endif
      {"row losses that are refused", test::row_refusals},
      {"element-wise losses", test::pointwise_losses},
      {"element-wise losses, usual calls", test::usual_pointwise_losses},
      {"losses of several rows", test::multirow_losses},
      {"products", test::all_products},
  };
  CHECK(mbk::has_openmp(), "the runtime in this file is not used");
  for (const Group& g : groups) {
    const int before = test::failures;
    const auto start = std::chrono::steady_clock::now();
    const int64_t count = g.run(options);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    const int bad = test::failures - before;
    printf("%-6s %-40s %10lld checked, %d wrong, %.1f s, digest so far %016llx\n",
           bad ? "FAILED" : "ok", g.name, (long long)count, bad, time.count(),
           (unsigned long long)test::digest_of(0).value);
    fflush(stdout);
  }
  const auto& tiers = mbk::available_backends();
  const uint64_t want = options.quick ? kQuickDigest : kDigest;
  for (size_t t = 0; t < tiers.size(); ++t) {
    CHECK(test::digest_of(t).value == want, "the digest of tier %s is not %016llx", tiers[t]->name,
          (unsigned long long)want);
    printf("tier %-8s digest%s %016llx\n", tiers[t]->name, options.quick ? " (quick)" : "",
           (unsigned long long)test::digest_of(t).value);
  }
  if (test::failures) printf("core_test: %d checks failed\n", test::failures);
  return test::failures != 0;
}
