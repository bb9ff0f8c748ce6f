#include "report.h"

#include <stdio.h>

#include <map>

namespace shim {
namespace {

std::string place(Where where) {
  if (!where.file) return "";
  return std::string(" at ") + where.file + ":" + std::to_string(where.line);
}
std::string doing(const Fibre& fibre) {
  std::string text = fibre.state;
  if (fibre.mask && text.compare(0, 2, "__") == 0) {
    char mask[32];
    snprintf(mask, sizeof mask, " (mask %08x)", fibre.mask);
    text += mask;
  }
  return text == kEnded || text == "not started" ? text : text + place(fibre.where);
}

// "P = Type" out of the name of the function template launch().
std::string parameters(const std::string& name) {
  const size_t first = name.find("P = ");
  return name.substr(first, name.find_first_of(";]", first) - first);
}

}  // namespace

std::string describe(const Fibre& fibre, Where where) {
  return "block " + std::to_string(fibre.block->index.x) + ", thread " +
         std::to_string(fibre.thread.x) + place(where);
}

std::string report(const std::string& what, const Launch& launch, const std::string& order,
                   const Block* blocks, size_t count) {
  std::string text = "CUDA shim: " + what + "\n  a kernel of " + parameters(launch.name) +
                     place(launch.where) + ", " + std::to_string(launch.blocks) + " blocks of " +
                     std::to_string(launch.threads) + " threads, clusters of " +
                     std::to_string(launch.cluster) + ", order " + order;
  for (size_t b = 0; b < count; ++b) {
    const Block& block = blocks[b];
    std::map<std::string, std::string> threads;  // doing what: "0-31 40"
    for (unsigned first = 0, next; first < block.threads; first = next) {
      const std::string now = doing(block.first[first]);
      for (next = first + 1; next < block.threads && doing(block.first[next]) == now;) ++next;
      threads[now] += " " + std::to_string(first);
      if (next > first + 1) threads[now] += "-" + std::to_string(next - 1);
    }
    for (const auto& [now, which] : threads) {
      text += "\n  block " + std::to_string(block.index.x) + ": " + now + ": threads" + which;
    }
  }
  return text;
}

}  // namespace shim
