// Small fixed calls of the core, whose instructions are counted by bench/instructions.py.
//   instructions
// Runs every case on the scalar and AVX2 tiers, on one thread, and prints their names in order. Of
// each, `measured` is entered once: a tool that counts inside it counts the call and nothing else.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

#include "core/environment.h"
#include "core/product_args.h"
#include "cpu/dispatch.h"
#include "cpu/list_call.h"
#include "cpu/multirow_call.h"
#include "cpu/pointwise_call.h"
#include "cpu/row_call.h"
#include "losses/all.h"

#if defined(__clang__)
#define MBK_ALONE __attribute__((noinline))
#else
#define MBK_ALONE __attribute__((noipa))  // no copy of it for one caller, under another name
#endif
extern "C" MBK_ALONE void measured(const std::function<void()>* call) { (*call)(); }

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

// c += a^T b, in the order that fast mode or split-invariant mode takes.
void product(const mbk::Backend& tier, DType type, mbk::ProductOrder order) {
  constexpr int64_t kRows = 96, kColumns = 64, kDepth = 300;
  const std::vector<float> a = numbers(kDepth * kRows, 6), b = numbers(kDepth * kColumns, 7);
  const std::vector<uint16_t> narrow = as_bf16(a);
  std::vector<float> c((size_t)(kRows * kColumns));
  void* const scratch = aligned_alloc(64, mbk::kProductScratch);
  mbk::ProductArgs p{};
  p.rows = kRows, p.columns = kColumns, p.depth = kDepth;
  p.a = {type == DType::f32 ? (const void*)a.data() : narrow.data(), type, kRows, 1};
  p.b = {b.data(), DType::f32, kColumns, 1};
  p.c = c.data(), p.c_dtype = DType::f32, p.c_stride = kColumns;
  p.order = order, p.threads = 1, p.scratch = (char*)scratch;
  const std::function<void()> call = [&] {
    if (!tier.product(p)) abort();
  };
  measured(&call);
  free(scratch);
}

// Many small tensors: gradients into buffers, or buffers into gradients.
void lists(const mbk::Backend& tier, DType type, bool flush) {
  constexpr int64_t kTensors = 40, kSize = 700;
  std::vector<float> buffer((size_t)(kTensors * kSize)), x = numbers(kTensors * kSize, 8);
  std::vector<uint16_t> narrow = as_bf16(x);
  std::vector<mbk::ListTensor> tensors((size_t)kTensors);
  int64_t blocks = 0;
  for (int64_t k = 0; k < kTensors; ++k) {
    mbk::ListTensor& t = tensors[(size_t)k];
    t.size = t.shape[0] = kSize, t.dims = 1, t.first_block = blocks;
    blocks += mbk::list_blocks(kSize);
    void* const grad =
        type == DType::f32 ? (void*)(x.data() + k * kSize) : (void*)(narrow.data() + k * kSize);
    t.views[mbk::kBuffer] = {buffer.data() + k * kSize, DType::f32, {1}};
    t.views[mbk::kListGrad] = {grad, type, {1}};
  }
  std::vector<double> squares((size_t)kTensors);
  double stats[mbk::kFlushStats];
  const mbk::Scalar one{1, nullptr, DType::f64}, three{3, nullptr, DType::f64};
  const mbk::TensorList list{tensors.data(), kTensors, blocks};
  const std::function<void()> call = [&] {
    if (flush) {
      mbk::FlushArgs a{};
      a.list = list, a.factor = a.grad_scale = one, a.denominator = three, a.threads = 1;
      mbk::run_flush(tier, a, 1.0, stats, squares.data());
    } else {
      mbk::AccumulateArgs a{};
      a.list = list, a.alpha = a.beta = one, a.threads = 1;
      mbk::run_accumulate(tier, a, squares.data());
    }
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
    begin(*tier, "product fp32, chain (300, 96, 64)");
    product(*tier, DType::f32, mbk::ProductOrder::chain);
    begin(*tier, "product bf16, blocks (300, 96, 64)");
    product(*tier, DType::bf16, mbk::ProductOrder::blocks);
    begin(*tier, "accumulate fp32, 40 tensors of 700");
    lists(*tier, DType::f32, false);
    begin(*tier, "accumulate bf16, 40 tensors of 700");
    lists(*tier, DType::bf16, false);
    begin(*tier, "flush to bf16, 40 tensors of 700");
    lists(*tier, DType::bf16, true);
  }
}
