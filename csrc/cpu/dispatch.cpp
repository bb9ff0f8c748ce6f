#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mbk {
namespace {

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

constexpr bool has_all(unsigned word, unsigned mask) { return (word & mask) == mask; }

// The registers that the operating system saves on a context switch (XCR0).
unsigned saved_state() {
  if (!(Cpuid(1, 0).ecx & bit_OSXSAVE)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// What -march=x86-64-v3 and -v4 let the compiler use (psABI levels), and the registers they need.
bool supports_avx2() {
  constexpr unsigned kXmmYmm = 0x6;
  const Cpuid basic(1, 0), extended(7, 0), amd(0x80000001u, 0);
  constexpr unsigned kLzcnt = 1u << 5;
  return has_all(saved_state(), kXmmYmm) &&
         has_all(basic.ecx, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE | bit_POPCNT | bit_SSE4_2) &&
         has_all(extended.ebx, bit_AVX2 | bit_BMI | bit_BMI2) && has_all(amd.ecx, kLzcnt);
}

bool supports_avx512() {
  constexpr unsigned kXmmYmmZmmMasks = 0xe6;
  return supports_avx2() && has_all(saved_state(), kXmmYmmZmmMasks) &&
         has_all(Cpuid(7, 0).ebx,
                 bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
}

#endif

struct Tier {
  const Backend* backend;
  bool (*supported)();
};

constexpr Tier kTiers[] = {
#if defined(__x86_64__)
    {&avx512::backend, supports_avx512},
    {&avx2::backend, supports_avx2},
#endif
    {&scalar::backend, [] { return true; }},
};

std::atomic<const Backend*> chosen{nullptr};

}  // namespace

const std::vector<const Backend*>& available_backends() {
  static const std::vector<const Backend*> found = [] {
    std::vector<const Backend*> list;
    for (const Tier& tier : kTiers)
      if (tier.supported()) list.push_back(tier.backend);
    return list;
  }();
  return found;
}

const Backend& find_backend(const std::string& name) {
  std::string names;
  for (const Backend* b : available_backends()) {
    if (name == b->name) return *b;
    names += (names.empty() ? "" : ", ") + std::string(b->name);
  }
  for (const Tier& tier : kTiers)
    if (name == tier.backend->name)
      throw std::invalid_argument(
          "mbkern: this processor or operating system does not support ISA '" + name +
          "' (available: " + names + ")");
  throw std::invalid_argument("mbkern: unknown ISA '" + name + "' (available: " + names + ")");
}

const Backend& current_backend() {
  const Backend* backend = chosen.load(std::memory_order_acquire);
  if (!backend) {
    const char* wanted = std::getenv("MBKERN_ISA");
    backend = wanted && *wanted ? &find_backend(wanted) : available_backends().front();
    chosen.store(backend, std::memory_order_release);
  }
  return *backend;
}

void set_current_backend(const std::string& name) {
  chosen.store(&find_backend(name), std::memory_order_release);
}

bool has_bf16_pairs() {
#if defined(__x86_64__)
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  static const bool has = supports_avx512() && has_all(Cpuid(7, 1).eax, kAvx512Bf16);
  return has && &current_backend() == &avx512::backend;
#else
  return false;
#endif
}

bool is_amd() {
#if defined(__x86_64__)
  const Cpuid vendor(0, 0);
  return vendor.ebx == signature_AMD_ebx && vendor.ecx == signature_AMD_ecx &&
         vendor.edx == signature_AMD_edx;
#else
  return false;
#endif
}

}  // namespace mbk
