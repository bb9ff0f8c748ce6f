#pragma once
// The order in which runnable threads are taken, and clusters of a grid.
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

namespace shim {

class Order {
 public:
  static Order from_environment(unsigned clusters) {
    const char* const text = getenv("MBKERN_SHIM_ORDER");
    Order order;
    if (text) order.text_ = text;
    if (order.text_.compare(0, 7, "random:") == 0) {
      order.kind_ = kRandom;
      order.seed_ = strtoull(order.text_.c_str() + 7, nullptr, 10);
    } else if (order.text_ == "descending") {
      order.kind_ = kDescending;
    } else if (order.text_ != "ascending") {
      throw std::runtime_error("MBKERN_SHIM_ORDER=" + order.text_ +
                               "; needed is ascending, descending or random:<seed>");
    }
    order.clusters_.resize(clusters);
    for (unsigned i = 0; i < clusters; ++i) order.clusters_[i] = i;
    if (order.kind_ == kDescending && !races::kOn)
      std::reverse(order.clusters_.begin(), order.clusters_.end());
    if (order.kind_ == kRandom) {
      for (unsigned i = clusters; i > 1; --i) {
        std::swap(order.clusters_[i - 1], order.clusters_[order.next() % i]);
      }
    }
    return order;
  }
  unsigned cluster(unsigned i) const { return clusters_[i]; }
  // Clusters that are under way together: one after the other in the plain orders.
  unsigned clusters_at_once(unsigned threads) const {
    const unsigned fit = std::max(1u, 4096 / threads);
    return kind_ == kRandom ? std::min({fit, 4u, (unsigned)clusters_.size()}) : 1;
  }
  const std::string& text() const { return text_; }

 private:
  friend class Ready;
  enum Kind { kAscending, kDescending, kRandom } kind_ = kAscending;
  std::string text_ = "ascending";
  uint64_t seed_ = 0;
  std::vector<unsigned> clusters_;

  uint64_t next() {  // splitmix64 (Steele, Lea & Flood 2014)
    uint64_t z = (seed_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
};

// The threads that can run: a bit each.
class Ready {
 public:
  void reset(unsigned count, const Order& order) {
    words_.assign((count + 63) / 64, 0);
    order_ = order;
  }
  void add(unsigned number) { words_[number / 64] |= uint64_t{1} << number % 64; }
  // The one whose turn it is, or -1. In random order: the first at or behind a random place.
  int take() {
    const int n = (int)words_.size();
    int word = 0;
    switch (order_.kind_) {
      case Order::kAscending:
        while (word < n && !words_[word]) ++word;
        break;
      case Order::kDescending:
        for (word = n - 1; word >= 0; --word) {
          if (words_[word]) return take(word, 63 - __builtin_clzll(words_[word]));
        }
        return -1;
      case Order::kRandom: {
        const uint64_t place = order_.next() % (64u * (unsigned)n);
        word = (int)(place / 64);
        const uint64_t behind = words_[word] >> place % 64 << place % 64;
        if (behind) return take(word, __builtin_ctzll(behind));
        int left = n;
        do word = word + 1 == n ? 0 : word + 1;
        while (!words_[word] && --left);
        if (!left) return -1;
      }
    }
    return word < n ? take(word, __builtin_ctzll(words_[word])) : -1;
  }

 private:
  int take(int word, int bit) {
    words_[word] &= ~(uint64_t{1} << bit);
    return word * 64 + bit;
  }
  Order order_;
  std::vector<uint64_t> words_;
};

}  // namespace shim
