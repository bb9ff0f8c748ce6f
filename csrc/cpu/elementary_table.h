#pragma once
#include "core/backend.h"
#include "core/elementary.h"

namespace mbk::MBK_ISA {

struct ElementaryTable {
  Elementary rows[ElementaryFunctions::size + 1];  // ends with a null name
};

}  // namespace mbk::MBK_ISA
