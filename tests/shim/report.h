#pragma once
// The text of a Fault.
#include <string>

#include "state.h"

namespace shim {

std::string describe(const Fibre& fibre, Where where);
// What happened, in which launch, and what each thread of the blocks under way is doing; threads
// that do the same are listed together.
std::string report(const std::string& what, const Launch& launch, const std::string& order,
                   const Block* blocks, size_t count);

}  // namespace shim
