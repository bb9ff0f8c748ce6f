// Losses of several rows an item: the kernel, and whole calls.
#include "cuda/multirow_block.cuh"
#include "cuda/reduce_launch.h"

namespace mbk::MBK_ISA {
namespace {

template <class Loss, class T>
__global__ void __launch_bounds__(kMostWarps<T>* kWarp, 1)
    multirow(const __grid_constant__ MultirowLaunch p) {
  typedef typename MultirowBlock<Loss, T>::Shared Shared;
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    clear(shared.total);
    shared.item_scale = ItemScale<T>(p.args);
    shared.c = Constants{};
  }
  __syncthreads();
  const MultirowBlock<Loss, T> block(p, shared);
  for (int64_t i = blockIdx.x; i < p.args.items; i += gridDim.x) {
    const T loss = block.item(i);
    if (threadIdx.x == 0) {
      if (p.args.losses) ((T*)p.args.losses)[i] = loss;
      if (sizeof(T) == 4 && p.row.totals) add(shared.total, (float)loss);
    }
    __syncthreads();  // before the next item takes the shared memory
  }
  finish_rows(p.row, read(p.args.denominator), shared.total, &shared.is_last);
}

struct Kernel {
  void (*run)(MultirowLaunch);
  size_t shared_bytes, kept_bytes;  // a block of columns
  int levels;
};
template <class Loss, class T>
constexpr Kernel kernel_of() {
  typedef MultirowBlock<Loss, T> B;
  return {&multirow<Loss, T>, sizeof(typename B::Shared),
          B::kKeeps ? Loss::kKept * kBlock * sizeof(T) : 0, Loss::kLevels};
}
template <class... L>
const Kernel& find(LossList<L...>, int loss, DType type) {
  static constexpr Kernel kernels[][2] = {{kernel_of<L, float>(), kernel_of<L, double>()}...};
  return kernels[loss][type == DType::f64];
}

// How a kernel is launched.
struct Shape {
  unsigned blocks, threads;
  int kept_blocks;
  size_t shared_bytes;
};
// `bytes` of shared memory are needed.
template <class T>
Shape shape_of(const Device& device, const Kernel& kernel, const MultirowArgs& a, size_t bytes) {
  constexpr int64_t kThreadsAtOnce = sizeof(T) == 4 ? 1024 : 512;  // by their registers
  constexpr int64_t kMostResident = 32;  // blocks of threads of a multiprocessor
  // Two such rows a multiprocessor stay in the second-level cache of sm_80 and sm_90, which is of
  // 380 KB for each. Of larger ones there is one.
  constexpr int64_t kLongRow = 160 << 10;
  int64_t row = 0;
  for (const RowTensor& input : a.inputs)
    if (input.data) row += a.columns * bytes_of(input.dtype);
  const int64_t columns = std::max<int64_t>(1, (a.columns + kBlock - 1) / kBlock);  // in blocks
  const int64_t most = row > kLongRow ? kMostWarps<T> : std::min(kMostWarps<T>, 16);
  const int64_t threads = std::min(most, columns) * kWarp;
  const int64_t resident = std::min(kMostResident, std::max<int64_t>(1, kThreadsAtOnce / threads));
  const int64_t blocks = device.multiprocessors * resident;
  Shape s{};
  s.threads = static_cast<unsigned>(threads);
  s.blocks = static_cast<unsigned>(std::min(std::max<int64_t>(1, a.items), blocks));
  s.shared_bytes = bytes;
  bool passes = kernel.levels > 1;  // after the one that keeps
  for (const RowTensor& grad : a.grads) passes = passes || grad.data;
  if (!kernel.kept_bytes || !passes) return s;
  // As many as leave room for three quarters of the threads.
  constexpr int64_t kReserved = 1024;  // of a block, by the system
  const int64_t room = static_cast<int64_t>(device.shared_bytes) / (resident - resident / 4) -
                       kReserved - static_cast<int64_t>(bytes);
  const auto size = static_cast<int64_t>(kernel.kept_bytes);
  s.kept_blocks = static_cast<int>(std::max<int64_t>(0, std::min(columns, room / size)));
  s.shared_bytes += static_cast<size_t>(s.kept_blocks * size);
  return s;
}

template <class T>
void run(const Queue& queue, int loss, DType type, MultirowArgs a, const Result& result) {
  const MultirowTraits& traits = multirow_traits(loss);
  const Device& device = current_device();
  const Work work(queue, a.items);
  work.clear();
  traits.prepare(a);
  a.target_is_index = traits.target == ItemTarget::index && a.target;
  RowArgs weighed = a;
  if (!traits.weighs_divisor) weighed.class_weight = nullptr;

  const bool mean = result.reduction == Reduction::mean;
  const bool weighted = a.target_is_index || a.sample_weight;
  const double items = static_cast<double>(a.items);
  a.denominator = !mean                    ? Scalar{1, nullptr, DType::f64}
                  : result.has_denominator ? result.denominator
                  : weighted               ? Scalar{0, &work.state->divisor, DType::f64}
                                           : Scalar{items, nullptr, DType::f64};
  if (mean && !result.has_denominator && weighted)
    launch_reduce<T>(work, ItemWeights<T>{weighed}, a.items,
                     {&work.state->divisor, 1, nullptr, {}, {}});
  const bool reduces = (result.reduction != Reduction::none && result.loss) || result.loss_sum;
  if (reduces && sizeof(T) == 8 && !a.losses) a.losses = work.losses;
  MultirowLaunch p{};
  p.row.args = a, p.args = a;
  p.row.result = result, p.row.work = work.state, p.row.errors = device.errors;
  p.row.totals = reduces && sizeof(T) == 4;

  const Kernel& kernel = find(MultirowLosses{}, loss, type);
  size_t bytes = kernel.shared_bytes;
  if (traits.target == ItemTarget::list) bytes += static_cast<size_t>(a.columns) * sizeof(int32_t);
  if (bytes > device.shared_bytes)
    throw std::runtime_error("mbkern: rows of " + std::to_string(a.columns) +
                             " classes with lists of targets are too long for a CUDA device");
  const Shape shape = shape_of<T>(device, kernel, a, bytes);
  p.kept_blocks = shape.kept_blocks;
  check(launch(kernel.run, p, shape.blocks, shape.threads, 1, shape.shared_bytes, work.stream),
        "launching a loss of rows");
  if (reduces && sizeof(T) == 8)
    launch_reduce<T>(work, Array<T>{static_cast<const T*>(a.losses)}, a.items,
                     {nullptr, 1, nullptr, result, a.denominator});
}

}  // namespace

void run_multirow_loss(const Queue& queue, int loss, DType type, MultirowArgs args,
                       const Result& result) {
  type == DType::f64 ? run<double>(queue, loss, type, args, result)
                     : run<float>(queue, loss, type, args, result);
}

}  // namespace mbk::MBK_ISA
