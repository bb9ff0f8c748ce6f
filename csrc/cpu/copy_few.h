#pragma once
// Copies of the partial groups at the ends of rows.
#include "core/lane.h"

namespace mbk::MBK_ISA {
namespace {

// n elements, fewer than a group, by vectors. A memcpy whose size is known to be small is compiled
// into string instructions, which take as long to start as a vector of a row.
template <class S>
MBK_FN void copy_few(S* to, const S* from, int64_t n) {
#if MBK_SIMD
  char* t = (char*)to;
  const char* f = (const char*)from;
  int64_t bytes = n * (int64_t)sizeof(S);
  for (; bytes >= kBytes; bytes -= kBytes, t += kBytes, f += kBytes) {
    f32v v;
    memcpy(&v, f, sizeof v);
    memcpy(t, &v, sizeof v);
  }
#if defined(__AVX512F__)
  if (!bytes) return;  // a store of nothing fetches its line, all the same
  const __mmask64 rest = ((__mmask64)1 << bytes) - 1;
  _mm512_mask_storeu_epi8(t, rest, _mm512_maskz_loadu_epi8(rest, f));
#else
  const auto piece = [&](auto size) __attribute__((always_inline)) {
    if (!(bytes & (int64_t)sizeof size)) return;
    memcpy(&size, f, sizeof size);
    memcpy(t, &size, sizeof size);
    t += sizeof size, f += sizeof size;
  };
  piece(__m128i{}), piece(uint64_t{}), piece(uint32_t{}), piece(uint16_t{});
#endif
#else
  memcpy(to, from, (size_t)n * sizeof(S));
#endif
}

// A group that begins with n elements; the others are `fill`. Whole vectors are stored, since they
// are about to be loaded.
template <class S, int kCount>
MBK_FN void copy_group(S (&to)[kCount], const S* from, int64_t n, S fill) {
#if MBK_SIMD && defined(__AVX512F__)
  S filled[kBytes / sizeof(S)];
  for (S& s : filled) s = fill;
  __m512i others;
  memcpy(&others, filled, sizeof others);
  for (int64_t at = 0; at < (int64_t)sizeof to; at += kBytes) {
    const int64_t left = n * (int64_t)sizeof(S) - at;
    __m512i v = others;
    if (left >= kBytes)
      v = _mm512_loadu_si512((const char*)from + at);
    else if (left > 0)
      v = _mm512_mask_loadu_epi8(others, (1ull << left) - 1, (const char*)from + at);
    _mm512_storeu_si512((char*)to + at, v);
  }
#else
  for (S& s : to) s = fill;
  copy_few(to, from, n);
#endif
}

}  // namespace
}  // namespace mbk::MBK_ISA
