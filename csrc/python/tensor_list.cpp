// The calls over lists of tensors: whether the kernels can take them is decided here, before
// anything is written; Python explains why not.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "core/merged_shape.h"
#include "cpu/dispatch.h"
#include "cpu/list_call.h"
#include "python/fields.h"
#include "python/functions.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

using Kind = Tensor::Kind;

struct Bytes {
  const char *first, *end;
  bool written;
};

// The tensors of a call, as they are read.
class List {
 public:
  explicit List(std::size_t count) {
    tensors_.reserve(count), dims_.reserve(count), buffers_.reserve(count);
    others_.reserve(3 * count);
  }
  bool good = true;

  // The first view sets the shape of each tensor.
  void add(std::int64_t k, const Tensor& x, ListView view, bool written) {
    if (view == kBuffer) tensors_.emplace_back();
    if (!good || k >= count() || x.kind > Kind::floating) return refuse();
    ListTensor& t = tensors_[static_cast<std::size_t>(k)];
    if (!x) return view == kBuffer ? refuse() : void();
    if (view == kBuffer) {
      dims_.push_back(x.dims);
      t.size = x.numel();
      for (int d = 0; d < std::min(x.dims, kMaxDims); ++d) t.shape[d] = x.shape[d];
    }
    const int dims = dims_[static_cast<std::size_t>(k)];
    if (x.dims != dims || dims > kMaxDims) return refuse();
    t.dims = dims;
    View& v = t.views[view];
    v.data = x.data, v.dtype = x.dtype;
    for (int d = 0; d < dims; ++d) {  // a call of a library function takes longer
      if (x.shape[d] != t.shape[d]) return refuse();
      v.strides[d] = x.strides[d];
    }
    if (!t.size) return;
    const View& buffer = t.views[kBuffer];
    bool in_place = view == kListGrad && v.data == buffer.data && v.dtype == buffer.dtype;
    for (int d = 0; d < dims; ++d)
      in_place = in_place && (t.shape[d] == 1 || v.strides[d] == buffer.strides[d]);
    if (written && meets_itself(t, v)) return refuse();
    if (in_place && written) {  // the buffer's own elements: they are written, and read before
      buffers_[static_cast<std::size_t>(k)].written = true;
      return;
    }
    std::int64_t last = 0;
    for (int d = 0; d < dims; ++d) last += (x.shape[d] - 1) * x.strides[d];
    const char* const first = static_cast<const char*>(x.data);
    const Bytes bytes{first, first + (last + 1) * kBytes[static_cast<int>(x.dtype)], written};
    if (view == kBuffer) {
      buffers_.resize(static_cast<std::size_t>(k));
      buffers_.push_back(bytes);
    } else {
      others_.push_back(bytes);
    }
  }

  // A number that the device reads while it writes.
  void add_read(const Scalar& s) {
    const char* const at = static_cast<const char*>(s.pointer);
    if (at) others_.push_back({at, at + kBytes[static_cast<int>(s.dtype)], false});
  }

  // Once all views are there. False for what is not suited.
  bool finish() {
    if (!good || overlap()) return false;
    std::int64_t blocks = 0;
    for (ListTensor& t : tensors_) {
      merge_dims(t, t.views, kListViews);
      t.first_block = blocks;
      blocks += list_blocks(t.size);
      elements_ += t.size;
    }
    blocks_ = blocks;
    return true;
  }

  std::int64_t count() const { return static_cast<std::int64_t>(tensors_.size()); }
  std::int64_t elements() const { return elements_; }
  TensorList get() const { return {tensors_.data(), count(), blocks_}; }
  std::vector<ListTensor>& tensors() { return tensors_; }

 private:
  static constexpr std::int64_t kBytes[kDTypes] = {4, 2, 2, 8};
  void refuse() { good = false; }

  // Whether two elements of a view may share memory.
  static bool meets_itself(const ListTensor& t, const View& v) {
    if (t.dims == 1) return t.shape[0] > 1 && v.strides[0] <= 0;
    struct Dim {
      std::int64_t stride, size;
    } dims[kMaxDims];
    int count = 0;
    for (int d = 0; d < t.dims; ++d) {
      if (t.shape[d] < 2) continue;
      int at = count++;  // by strides, least first
      for (; at > 0 && dims[at - 1].stride > v.strides[d]; --at) dims[at] = dims[at - 1];
      dims[at] = {v.strides[d], t.shape[d]};
    }
    std::int64_t reach = 0;
    for (int k = 0; k < count; ++k) {
      if (dims[k].stride <= reach) return true;
      reach += dims[k].stride * (dims[k].size - 1);
    }
    return false;
  }

  // Whether something that is written meets anything else.
  bool overlap() {
    const auto earlier = [](const Bytes& a, const Bytes& b) { return a.first < b.first; };
    for (std::vector<Bytes>* list : {&buffers_, &others_})  // often they are allocated in order
      if (!std::is_sorted(list->begin(), list->end(), earlier))
        std::sort(list->begin(), list->end(), earlier);
    std::vector<Bytes> all(buffers_.size() + others_.size());
    std::merge(buffers_.begin(), buffers_.end(), others_.begin(), others_.end(), all.begin(),
               earlier);
    const char *written = nullptr, *any = nullptr;
    for (const Bytes& b : all) {
      if (b.first < written || (b.written && b.first < any)) return true;
      if (b.written) written = std::max(written, b.end);
      any = std::max(any, b.end);
    }
    return false;
  }

  std::vector<ListTensor> tensors_;
  std::vector<int> dims_;
  std::vector<Bytes> buffers_, others_;
  std::int64_t elements_ = 0, blocks_ = 0;
};

// Whether a buffer takes gradients of this type: it widens them exactly, or is bf16 that is more
// than rounded to.
bool takes(const ListTensor& t, bool by_chance) {
  const DType buffer = t.views[kBuffer].dtype, grad = t.views[kListGrad].dtype;
  const View& low = t.views[kListLow];
  if (buffer == DType::bf16)
    return grad != DType::f64 && (low.data ? low.dtype == DType::bf16 : by_chance || !t.size);
  return !low.data && (buffer == DType::f64 || (buffer == DType::f32 && grad != DType::f64));
}

// Numbers that a call leaves, one after the other.
double* numbers(const Tensor& t, std::int64_t count, bool& good) {
  good = good && (!t || (t.is(DType::f64) && t.dims == 1 && t.numel() >= count &&
                         (count < 2 || t.strides[0] == 1)));
  return static_cast<double*>(t.data);
}

// None, with nothing written, for what is not suited.
py::object accumulate(const py::tuple& fields) {
  Fields f(fields);
  List list(f.list_size());
  f.tensors(true, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kBuffer, true); });
  const std::int64_t grads =
      f.tensors(false, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kListGrad, false); });
  const std::int64_t lows = f.tensors_if_any(
      true, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kListLow, true); });
  const bool by_chance = !f.is_absent();
  if (by_chance)
    f.number_each(list.count(), [&](std::int64_t k, double key) {
      list.tensors()[std::size_t(k)].key = static_cast<std::uint64_t>(key);
    });
  AccumulateArgs a{};
  bool good = f.scalar(a.alpha) && (lows < 0 || lows == list.count());
  good = f.scalar(a.beta) && good;
  const Tensor squares = f.output();
  double* const sums = numbers(squares, list.count(), good);
  a.threads = static_cast<int>(f.integer());
  cuda::Queue queue;
  std::int64_t workspace_bytes;
  good = f.queue(queue, workspace_bytes) && good;
  f.finish();
  if (!f.on_host()) list.add_read(a.alpha), list.add_read(a.beta);
  if (!good || grads != list.count() || !list.finish()) return py::none();
  for (const ListTensor& t : list.tensors())
    if (!t.views[kListGrad].data && t.size) return py::none();
  for (const ListTensor& t : list.tensors())
    if (!takes(t, by_chance)) return py::none();
  a.list = list.get();
  {
    const Unlocked unlocked(list.elements(), f.on_host());
    if (f.on_host()) {
      run_accumulate(current_backend(), a, sums);
    } else {
      if (sums && workspace_bytes < cuda::list_workspace_bytes(a.list.count, a.list.blocks))
        throw std::invalid_argument("mbkern._C: the workspace is too small; the callers differ");
      cuda::run_accumulate(queue, a, sums);
    }
  }
  return py::bool_(true);
}

// The types that a buffer is rounded to, once.
bool rounds_once(DType buffer, DType grad) {
  return buffer != DType::f64 || grad == DType::f64 || grad == DType::f32;
}

// None, with nothing written, for what is not suited.
py::object flush(const py::tuple& fields) {
  Fields f(fields);
  List list(f.list_size());
  f.tensors(false, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kBuffer, false); });
  f.tensors(true, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kListGrad, true); });
  f.tensors(false, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kListParameter, false); });
  f.tensors_if_any(false, [&](Py_ssize_t k, const Tensor& t) { list.add(k, t, kListLow, false); });
  std::vector<ListTensor>& tensors = list.tensors();
  f.number_each(list.count(), [&](std::int64_t k, double x) { tensors[std::size_t(k)].l1 = x; });
  f.number_each(list.count(), [&](std::int64_t k, double x) { tensors[std::size_t(k)].l2 = x; });
  FlushArgs a{};
  bool good = f.numbers();
  for (Scalar* s : {&a.factor, &a.denominator, &a.grad_scale}) good = f.scalar(*s) && good;
  const double max_norm = f.number();
  const Tensor stats = f.output(), squares = f.output();
  double* const results = numbers(stats, kFlushStats, good);
  double* const sums = numbers(squares, list.count(), good);
  a.threads = static_cast<int>(f.integer());
  cuda::Queue queue;
  std::int64_t workspace_bytes;
  good = f.queue(queue, workspace_bytes) && good;
  f.finish();
  if (!f.on_host())
    for (const Scalar* s : {&a.factor, &a.denominator, &a.grad_scale}) list.add_read(*s);
  if (!good || !results || !list.finish()) return py::none();
  for (const ListTensor& t : tensors) {
    const View &buffer = t.views[kBuffer], &grad = t.views[kListGrad];
    if (buffer.dtype == DType::f16) return py::none();
    const View& low = t.views[kListLow];
    if (low.data && (low.dtype != DType::bf16 || buffer.dtype != DType::bf16)) return py::none();
    if (grad.data && !rounds_once(buffer.dtype, grad.dtype)) return py::none();
    if (t.size && (t.l1 != 0 || t.l2 != 0) && !t.views[kListParameter].data) return py::none();
  }
  a.list = list.get();
  {
    const Unlocked unlocked(list.elements(), f.on_host());
    if (f.on_host()) {
      run_flush(current_backend(), a, max_norm, results, sums);
    } else {
      if (workspace_bytes < cuda::list_workspace_bytes(a.list.count, a.list.blocks))
        throw std::invalid_argument("mbkern._C: the workspace is too small; the callers differ");
      cuda::run_flush(queue, a, max_norm, results, sums);
    }
  }
  return py::bool_(true);
}

}  // namespace

void add_tensor_lists(py::module_& m) {
  m.def("accumulate", &accumulate, py::arg("fields"));
  m.def("flush", &flush, py::arg("fields"));
}

}  // namespace mbk::python
