// Small fixed calls of the core, whose instructions are counted by bench/instructions.py.
//   instructions
// Runs every case on the scalar and AVX2 tiers, on one thread, and prints their names in order. Of
// each, `measured` is entered once: a tool that counts inside it counts the call and nothing else.
#include <stdio.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

#include "core/environment.h"
#include "cpu/dispatch.h"
#include "cpu/multirow_call.h"
#include "cpu/pointwise_call.h"
#include "cpu/row_call.h"
#include "losses/all.h"

extern "C" __attribute__((noinline)) void measured(const std::function<void()>* call) { (*call)(); }

namespace {

using mbk::DType;

// Position of a loss in its list.
template <class... L>
int number_of(mbk::host::LossList<L...>, const std::string& name) {
  int found = -1, at = 0;
  ((name == L::name ? (void)(found = at++) : (void)at++), ...);
  return found;
}

// Numbers in [-4, 4), the same everywhere.
std::vector<float> numbers(int64_t n, uint32_t seed) {
  std::vector<float> x((size_t)n);
  for (float& v : x) {
    seed = seed * 1664525u + 1013904223u;
    v = (float)(int32_t)seed * 0x1p-29f;
  }
  return x;
}

std::vector<uint16_t> as_bf16(const std::vector<float>& x) {
  std::vector<uint16_t> y;
  for (const float v : x) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    y.push_back((uint16_t)(bits >> 16));
  }
  return y;
}

std::vector<int64_t> classes(int64_t items, int64_t columns) {
  std::vector<int64_t> t((size_t)items);
  for (int64_t i = 0; i < items; ++i) t[(size_t)i] = i * 37 % columns;
  return t;
}

mbk::Result sum_into(float* loss) {
  mbk::Result r{};
  r.reduction = mbk::Reduction::sum, r.loss = loss, r.loss_dtype = DType::f32;
  return r;
}

void fill(mbk::RowArgs& a, int64_t items, int64_t columns, const std::vector<int64_t>& target) {
  a.items = items, a.inner_size = 1, a.columns = columns, a.threads = 1;
  a.input_strides = a.grad_strides = {columns, 0, 1};
  a.target = target.data(), a.target_is_index = true, a.target_strides = {1, 0, 0};
  a.ignore_index = -100;
  a.scale = a.denominator = {1, nullptr, DType::f64};
}

// Cross-entropy, the gradient over the input.
void rows(const mbk::Backend& tier, DType type, int64_t items, int64_t columns) {
  const std::vector<int64_t> target = classes(items, columns);
  std::vector<float> x = numbers(items * columns, 1);
  std::vector<uint16_t> narrow = as_bf16(x);
  void* const data = type == DType::f32 ? (void*)x.data() : narrow.data();
  float loss = 0;
  mbk::RowArgs a{};
  fill(a, items, columns, target);
  a.input = data, a.grad = data;
  const std::function<void()> call = [&] { mbk::run_row_loss(tier, 0, type, a, sum_into(&loss)); };
  measured(&call);
}

void pointwise(const mbk::Backend& tier, const std::string& name, int64_t n) {
  std::vector<float> x = numbers(n, 2), y = numbers(n, 3);
  for (float& v : y) v = v * 0.125f + 0.5f;  // a share, for losses that ask for one
  float loss = 0;
  mbk::PointwiseArgs a{};
  a.size = n, a.dims = 1, a.shape[0] = n, a.threads = 1;
  a.views[mbk::kInput] = a.views[mbk::kGrad] = {x.data(), DType::f32, {1}};
  a.views[mbk::kInput + 1] = {y.data(), DType::f32, {1}};
  a.parameters[0] = 0.25, a.parameters[1] = 2;
  a.scale = a.denominator = {1, nullptr, DType::f64};
  const int loss_number = number_of(mbk::host::PointwiseLosses{}, name);
  const std::function<void()> call = [&] {
    mbk::run_pointwise_loss(tier, loss_number, DType::f32, a, sum_into(&loss));
  };
  measured(&call);
}

void multirow(const mbk::Backend& tier, const std::string& name, int inputs, int64_t items,
              int64_t columns) {
  const std::vector<int64_t> target = classes(items, columns);
  std::vector<float> x[2] = {numbers(items * columns, 4), numbers(items * columns, 5)};
  float loss = 0;
  mbk::MultirowArgs a{};
  fill(a, items, columns, target);
  if (inputs == 2) a.target = nullptr;
  for (int k = 0; k < inputs; ++k) a.inputs[k] = {x[k].data(), DType::f32, {columns, 0, 1}};
  a.grads[0] = a.inputs[0];
  for (double& p : a.parameters) p = 1;
  const int loss_number = number_of(mbk::host::MultirowLosses{}, name);
  const std::function<void()> call = [&] {
    mbk::run_multirow_loss(tier, loss_number, DType::f32, a, sum_into(&loss));
  };
  measured(&call);
}

void begin(const mbk::Backend& tier, const char* what) { printf("%s, %s\n", what, tier.name); }

}  // namespace

int main() {
  const mbk::DefaultEnvironment environment;
  for (const char* isa : {"scalar", "avx2"}) {
    const mbk::Backend* tier = nullptr;
    for (const mbk::Backend* there : mbk::available_backends())
      if (there->name == std::string(isa)) tier = there;
    if (!tier) continue;
    begin(*tier, "cross_entropy fp32 (16, 4096)");
    rows(*tier, DType::f32, 16, 4096);
    begin(*tier, "cross_entropy bf16 (16, 4096)");
    rows(*tier, DType::bf16, 16, 4096);
    begin(*tier, "cross_entropy fp32 (512, 10)");
    rows(*tier, DType::f32, 512, 10);
    for (const char* name : {"half_squared_error", "huber_loss", "binary_cross_entropy_with_logits",
                             "sigmoid_focal_loss"}) {
      begin(*tier, name);
      pointwise(*tier, name, 20000);
    }
    begin(*tier, "kl_div_with_logits (16, 1000)");
    multirow(*tier, "kl_div_with_logits", 2, 16, 1000);
    begin(*tier, "softmax_focal_loss (16, 1000)");
    multirow(*tier, "softmax_focal_loss", 1, 16, 1000);
  }
}
