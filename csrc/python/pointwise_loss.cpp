// From tensors to a call of an element-wise loss, on every device.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "cpu/pointwise_call.h"
#include "losses/all.h"
#include "python/fields.h"
#include "python/functions.h"
#include "python/pointwise.h"

namespace py = pybind11;

namespace mbk::python {

bool merge(const Views& views, PointwiseArgs& a) {
  const Tensor& first = *views[0];
  a.dims = 0;
  if (!first.numel()) {
    a.shape[a.dims++] = 0;
    return true;
  }
  for (int d = 0; d < first.dims; ++d) {
    const std::int64_t size = first.shape[d];
    if (size == 1) continue;
    bool one = a.dims > 0;
    for (int v = 0; one && v < kViews; ++v)
      one = !*views[v] || a.views[v].strides[a.dims - 1] == views[v]->strides[d] * size;
    if (!one && a.dims == kMaxDims) return false;
    if (!one) a.shape[a.dims++] = 1;
    a.shape[a.dims - 1] *= size;
    for (int v = 0; v < kViews; ++v)
      if (*views[v]) a.views[v].strides[a.dims - 1] = views[v]->strides[d];
  }
  return true;
}

namespace {

// Returns the divisor of a mean, True on CUDA, where it is the first number of the workspace; None,
// with nothing written, for what is not suited.
py::object pointwise_loss(const py::tuple& fields) {
  Fields f(fields);
  PointwiseArgs a{};
  Result r{};
  const int loss = static_cast<int>(f.integer());
  const Tensor input = f.tensor(), target = f.tensor(), third = f.tensor(), weight = f.tensor();
  const Tensor rescale = f.tensor(), item_scale = f.tensor(), losses = f.output();
  const Tensor grad_input = f.output(), grad_target = f.output(), grad_third = f.output();
  a.accumulate = f.boolean();
  f.numbers(a.parameters);
  bool good = f.scalar(a.scale);
  good = f.result(r) && good;
  a.threads = static_cast<int>(f.integer());
  cuda::Queue queue;
  std::int64_t workspace_bytes;
  good = f.queue(queue, workspace_bytes) && f.numbers() && good;
  f.finish();

  using Kind = Tensor::Kind;
  if (!good || input.kind != Kind::floating || target.kind != Kind::floating) return py::none();
  if ((third || grad_third) && inputs_of(host::PointwiseLosses{}, loss) < 3) return py::none();
  const Views views = {&input,      &target, &third,      &weight,      &rescale,
                       &item_scale, &losses, &grad_input, &grad_target, &grad_third};
  const bool in_double = input.is(DType::f64) || target.is(DType::f64) || third.is(DType::f64);
  const DType type = in_double ? DType::f64 : DType::f32;
  for (int v = 0; v < kViews; ++v) {
    const Tensor& t = *views[v];
    if (!t) continue;
    if (t.kind != Kind::floating || !t.same_shape(input)) return py::none();
    a.views[v].data = t.data, a.views[v].dtype = t.dtype;
    if ((v == kWeight || v == kRescale || v == kItemScale) && t.dtype != type) return py::none();
  }
  if ((r.loss_sum && type == DType::f64) || !merge(views, a)) return py::none();
  if (f.overwrites(grad_input, a.scale, r.denominator) ||
      f.overwrites(grad_target, a.scale, r.denominator) ||
      f.overwrites(grad_third, a.scale, r.denominator))
    return py::none();

  if (!f.on_host()) {
    if (workspace_bytes < cuda::workspace_bytes(input.numel(), type == DType::f64))
      return py::none();
    {
      const py::gil_scoped_release unlocked;
      cuda::run_pointwise_loss(queue, loss, type, a, r);
    }
    return py::bool_(true);
  }
  const Backend& backend = current_backend();
  double divisor;
  {
    const Unlocked unlocked(input.numel());
    divisor = run_pointwise_loss(backend, loss, type, a, r);
  }
  return py::float_(divisor);
}

}  // namespace

void add_pointwise_loss(py::module_& m) {
  m.def("pointwise_loss", &pointwise_loss, py::arg("fields"));
}

}  // namespace mbk::python
