// From tensors to a call of a loss of several rows an item, on every device.
#include <pybind11/pybind11.h>

#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/multirow_call.h"
#include "losses/all.h"
#include "python/fields.h"
#include "python/functions.h"
#include "python/items.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

using Kind = Tensor::Kind;

// The target, as the loss has it; index targets may be absent from losses that do not need them.
bool read_target(const Tensor& t, const Tensor& input, const MBK_ISA::MultirowTraits& traits,
                 MultirowArgs& a) {
  a.target_is_index = false;
  if (!t) return traits.target == ItemTarget::none || traits.target_is_optional;
  const int dims = input.dims > 1 ? input.dims - 1 : 0;
  bool one_an_item = t.dims == dims;
  for (int d = 0; one_an_item && d < dims; ++d)
    one_an_item = t.shape[d] == input.shape[d ? d + 1 : 0];
  if (traits.target == ItemTarget::number) {
    a.label.data = t.data, a.label.dtype = t.dtype;
    return t.kind == Kind::floating && one_an_item && item_strides(t, false, a.label.strides);
  }
  if (t.kind != Kind::index) return false;
  a.target = t.data, a.target_type = t.index_type;
  if (traits.target == ItemTarget::list)
    return t.same_shape(input) && item_strides(t, true, a.target_strides);
  a.target_is_index = true;
  return traits.target == ItemTarget::index && one_an_item &&
         item_strides(t, false, a.target_strides);
}

// Returns the divisor of a mean, True on CUDA, where it is the first number of the workspace; None,
// with nothing written, for what is not suited.
py::object multirow_loss(const py::tuple& fields) {
  Fields f(fields);
  MultirowArgs a{};
  Result r{};
  const std::int64_t loss = f.integer();
  const Tensor x[kMaxRows] = {f.tensor(), f.tensor(), f.tensor()};
  const Tensor target = f.tensor(), weight = f.tensor();
  const Tensor sample_weight = f.tensor(), item_scale = f.tensor(), losses = f.output();
  const Tensor grad[kMaxRows] = {f.output(), f.output(), f.output()};
  a.accumulate = f.boolean(), a.ignore_index = f.integer();
  f.numbers(a.parameters);
  bool good = f.scalar(a.scale);
  good = f.result(r) && good;
  a.threads = static_cast<int>(f.integer());
  cuda::Queue queue;
  std::int64_t workspace_bytes;
  good = f.queue(queue, workspace_bytes) && f.numbers() && good;
  f.finish();

  const Tensor& input = x[0];
  if (!good || loss < 0 || loss >= MBK_ISA::MultirowLosses::size || input.dims < 1)
    return py::none();
  const MBK_ISA::MultirowTraits& traits = MBK_ISA::multirow_traits(static_cast<int>(loss));
  bool in_double = false;
  for (int k = 0; k < kMaxRows; ++k) {
    if (static_cast<bool>(x[k]) != (k < traits.inputs) || (grad[k] && k >= traits.gradients))
      return py::none();
    if (!x[k]) continue;
    if (x[k].kind != Kind::floating || !x[k].same_shape(input)) return py::none();
    a.inputs[k].data = x[k].data, a.inputs[k].dtype = x[k].dtype;
    good = good && item_strides(x[k], true, a.inputs[k].strides);
    in_double = in_double || x[k].is(DType::f64);
  }
  const DType type = in_double ? DType::f64 : DType::f32;
  a.columns = input.shape[input.dims > 1 ? 1 : 0];
  a.items = 1, a.inner_size = 1;
  for (int d = 0; d < input.dims; ++d) {
    if (d == (input.dims > 1 ? 1 : 0)) continue;
    a.items *= input.shape[d];
    if (d > 1) a.inner_size *= input.shape[d];
  }
  good = good && read_target(target, input, traits, a);
  if (good && weight)
    good = weight.is(type) && weight.dims == 1 && weight.shape[0] == a.columns &&
           (weight.strides[0] == 1 || a.columns <= 1) &&
           (traits.target_weights || traits.column_weights);
  a.class_weight = weight.data;
  good =
      good && per_item(sample_weight, input, in_double, a.sample_weight, a.sample_weight_strides);
  good = good && per_item(item_scale, input, in_double, a.item_scale, a.item_scale_strides);
  for (int k = 0; good && k < kMaxRows; ++k) {
    if (!grad[k]) continue;
    a.grads[k].data = grad[k].data, a.grads[k].dtype = grad[k].dtype;
    // An accumulated gradient may be fp32 in a call that is computed in fp64.
    const bool wide = grad[k].is(type) || (grad[k].is(DType::f32) && !x[k].is(DType::f64));
    good = grad[k].same_shape(input) && item_strides(grad[k], true, a.grads[k].strides) &&
           (a.accumulate ? wide : grad[k].is(x[k].dtype));
  }
  good = good && dense(losses, in_double, a.items, a.losses) && (!r.loss_sum || !in_double);
  // Rows are reduced by their maxima before they are scaled.
  const double scale = a.parameters[traits.scale_parameter < 0 ? 0 : traits.scale_parameter];
  good = good && (traits.scale_parameter < 0 || (scale > 0 && scale < HUGE_VAL));
  if (!good) return py::none();
  for (const Tensor& g : grad)
    if (f.overwrites(g, a.scale, r.denominator)) return py::none();

  if (!f.on_host()) {
    if (workspace_bytes < cuda::workspace_bytes(a.items, in_double)) return py::none();
    {
      const py::gil_scoped_release unlocked;
      cuda::run_multirow_loss(queue, static_cast<int>(loss), type, a, r);
    }
    return py::bool_(true);
  }
  const Backend& backend = current_backend();
  double divisor;
  {
    const Unlocked unlocked(input.numel());
    divisor = run_multirow_loss(backend, static_cast<int>(loss), type, a, r);
  }
  return py::float_(divisor);
}

}  // namespace

void add_multirow_loss(py::module_& m) {
  m.def("multirow_loss", &multirow_loss, py::arg("fields"));
}

}  // namespace mbk::python
