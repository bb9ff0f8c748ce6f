// Over tensors on CUDA: exact sums, whole arrays, elementary functions, bad class indices. What is
// not suited is a mistake of the callers in python/mbkern, which have checked. In a build without
// CUDA each call says so (cuda/absent.cpp).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "python/fields.h"
#include "python/functions.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

void require(bool good) {
  if (!good) throw std::invalid_argument("mbkern._C: wrong tensors; the callers differ");
}

ExactSumState* exact_state(const Tensor& t) {
  require(t.kind == Tensor::Kind::index && t.index_type == IndexType::i64 &&
          t.numel() * 8 == static_cast<std::int64_t>(sizeof(ExactSumState)));
  return static_cast<ExactSumState*>(t.data);
}

cuda::Queue queue_for(Fields& f, std::int64_t items) {
  cuda::Queue queue;
  std::int64_t bytes;
  require(f.queue(queue, bytes) && bytes >= cuda::workspace_bytes(items, false));
  f.finish();
  return queue;
}

// The fields are read, then all is checked, then the device's functions run without Python's lock.

void scale_array(const py::tuple& fields) {
  Fields f(fields);
  const Tensor x = f.tensor();
  Scalar factor, hint;
  const bool good = f.scalar(factor) & f.scalar(hint);
  const bool keep_zeros = f.boolean();
  const cuda::Queue queue{f.address(), nullptr};
  f.finish();
  require(good && x.kind == Tensor::Kind::floating);
  const py::gil_scoped_release unlocked;
  cuda::scale_array(queue, x.data, x.dtype, x.numel(), factor, hint, keep_zeros);
}

void convert_array(const py::tuple& fields) {
  Fields f(fields);
  const Tensor from = f.tensor(), to = f.tensor();
  const cuda::Queue queue{f.address(), nullptr};
  f.finish();
  require(from.kind == Tensor::Kind::floating && to.kind == Tensor::Kind::floating &&
          from.numel() == to.numel());
  const py::gil_scoped_release unlocked;
  cuda::convert_array(queue, from.data, from.dtype, to.data, to.dtype, from.numel());
}

void exact_result(const py::tuple& fields) {
  Fields f(fields);
  const Tensor sum = f.tensor();
  Result r{};
  const bool good = f.result(r);
  const cuda::Queue queue = queue_for(f, 0);
  require(good);
  const ExactSumState* const state = exact_state(sum);
  const py::gil_scoped_release unlocked;
  cuda::exact_result(queue, state, r);
}

void exact_merge(const py::tuple& fields) {
  Fields f(fields);
  const Tensor into = f.tensor(), from = f.tensor();
  const cuda::Queue queue = queue_for(f, 0);
  ExactSumState *const to = exact_state(into), *const other = exact_state(from);
  const py::gil_scoped_release unlocked;
  cuda::exact_merge(queue, to, other);
}

void exact_add(const py::tuple& fields) {
  Fields f(fields);
  const Tensor into = f.tensor(), values = f.tensor();
  const std::int64_t n = values.numel();
  const cuda::Queue queue = queue_for(f, n);
  require(values.is(DType::f32));
  ExactSumState* const state = exact_state(into);
  const py::gil_scoped_release unlocked;
  cuda::exact_add(queue, state, static_cast<const float*>(values.data), n);
}

bool elementary(const std::string& name, const py::tuple& fields) {
  Fields f(fields);
  const Tensor x = f.tensor(), y = f.tensor();
  const cuda::Queue queue{f.address(), nullptr};
  f.finish();
  const bool in_double = x.is(DType::f64);
  require((in_double || x.is(DType::f32)) && y.is(x.dtype) && x.numel() == y.numel());
  const py::gil_scoped_release unlocked;
  return cuda::elementary(queue, name.c_str(), in_double, x.data, y.data, x.numel());
}

py::tuple take_target_errors() {
  cuda::TargetErrors e;
  {
    const py::gil_scoped_release unlocked;
    e = cuda::take_target_errors();
  }
  return py::make_tuple(e.count, e.item, e.value, e.columns);
}

}  // namespace

void add_cuda(py::module_& m) {
  m.def("cuda_built", [] { return kCudaBuilt; });
  m.def("cuda_is_shim", [] { return kShim; });
  m.def("cuda_shim_is_on", &shim_is_on);
  m.def("cuda_switch_shim", &switch_shim, py::arg("on"));
  m.def("cuda_workspace_bytes", &cuda::workspace_bytes, py::arg("items"), py::arg("in_double"));
  m.def("cuda_list_workspace_bytes", &cuda::list_workspace_bytes, py::arg("tensors"),
        py::arg("blocks"));
  m.def("cuda_scale_array", &scale_array, py::arg("fields"));
  m.def("cuda_convert_array", &convert_array, py::arg("fields"));
  m.def("cuda_exact_result", &exact_result, py::arg("fields"));
  m.def("cuda_exact_merge", &exact_merge, py::arg("fields"));
  m.def("cuda_exact_add", &exact_add, py::arg("fields"));
  m.def("cuda_elementary", &elementary, py::arg("name"), py::arg("fields"));
  m.def("cuda_use_device", &cuda::use_device, py::arg("number"));
  m.def("cuda_take_target_errors", &take_target_errors);
}

}  // namespace mbk::python
