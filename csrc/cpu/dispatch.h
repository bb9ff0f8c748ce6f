#pragma once
// Which instruction set runs: the best one that the processor and the operating system support, or
// the one that MBKERN_ISA names.
#include <string>
#include <vector>

#include "core/backend.h"

namespace mbk {

// Best first; never empty.
const std::vector<const Backend*>& available_backends();

// Throws std::invalid_argument, naming what is available, for any other name.
const Backend& find_backend(const std::string& name);

// The backend in use. Chosen at the first call; throws as find_backend does if MBKERN_ISA is wrong.
const Backend& current_backend();
void set_current_backend(const std::string& name);

// Whether the processor multiplies pairs of bf16, and the backend in use would.
bool has_bf16_pairs();

// Whether AMD made the processor: MKL, which torch is built with, takes AVX2 there at most.
bool is_amd();

}  // namespace mbk
