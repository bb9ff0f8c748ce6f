// From tensors to a call of a row loss, on every device.
#include <pybind11/pybind11.h>

#include <cfloat>
#include <cmath>

#include "core/row_items.h"
#include "cpu/dispatch.h"
#include "cpu/row_call.h"
#include "python/fields.h"
#include "python/functions.h"
#include "python/items.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

// Returns the divisor of a mean, True on CUDA, where it is the first number of the workspace; None,
// with nothing written, for what is not suited.
py::object row_loss(const py::tuple& fields) {
  Fields f(fields);
  RowArgs a{};
  Result r{};
  const int loss = static_cast<int>(f.integer());
  const Tensor input = f.tensor(), target = f.tensor(), weight = f.tensor();
  const Tensor sample_weight = f.tensor(), grad = f.output(), item_scale = f.tensor();
  const Tensor losses = f.output(), state = f.output();
  a.accumulate = f.boolean(), a.from_state = f.boolean(), a.ignore_index = f.integer();
  a.label_smoothing = f.number(), a.z_loss = f.number();
  bool capped = false;
  a.softcap = f.number(capped);
  bool good = f.scalar(a.scale);
  good = f.scalar(a.denominator) && good;
  good = f.result(r) && good;
  a.threads = static_cast<int>(f.integer());
  cuda::Queue queue;
  std::int64_t workspace_bytes;
  good = f.queue(queue, workspace_bytes) && f.numbers() && good;
  f.finish();

  using Kind = Tensor::Kind;
  if (!good || input.kind != Kind::floating || input.dims < 1) return py::none();
  const bool in_double = input.dtype == DType::f64;
  a.columns = input.shape[input.dims > 1 ? 1 : 0];
  a.items = 1, a.inner_size = 1;
  for (int d = 0; d < input.dims; ++d) {
    if (d == (input.dims > 1 ? 1 : 0)) continue;
    a.items *= input.shape[d];
    if (d > 1) a.inner_size *= input.shape[d];
  }
  if (target.kind == Kind::index) {
    a.target_is_index = true, a.target_type = target.index_type;
    good = target.dims == (input.dims > 1 ? input.dims - 1 : 0);
    for (int d = 0; good && d < target.dims; ++d)
      good = target.shape[d] == input.shape[d ? d + 1 : 0];
  } else {
    good = target.is(input.dtype) && target.same_shape(input) && a.ignore_index < 0;
  }
  a.input = input.data, a.target = target.data, a.class_weight = weight.data;
  good = good && item_strides(input, true, a.input_strides) &&
         item_strides(target, !a.target_is_index, a.target_strides);
  if (good && weight)
    good = weight.is(in_double ? DType::f64 : DType::f32) && weight.dims == 1 &&
           weight.shape[0] == a.columns && (weight.strides[0] == 1 || a.columns <= 1);
  good =
      good && per_item(sample_weight, input, in_double, a.sample_weight, a.sample_weight_strides);
  good = good && per_item(item_scale, input, in_double, a.item_scale, a.item_scale_strides);
  if (good && grad) {
    a.grad = grad.data;
    const DType wanted = !a.accumulate ? input.dtype : in_double ? DType::f64 : DType::f32;
    good = grad.is(wanted) && grad.same_shape(input) && item_strides(grad, true, a.grad_strides);
  }
  const std::int64_t saved = a.target_is_index ? 2 : 3;
  good = good && dense(losses, in_double, a.items, a.losses) &&
         dense(state, in_double, saved * a.items, a.row_state) && (!a.from_state || state) &&
         (!r.loss_sum || !in_double);
  good = good && a.label_smoothing >= 0 && a.label_smoothing <= 1 &&
         (!capped || (a.softcap > 0 && a.softcap < HUGE_VAL));
  if (!in_double && a.softcap > FLT_MAX) a.softcap = 0;  // infinite in fp32: it caps nothing
  if (!good || f.overwrites(grad, a.scale, r.denominator)) return py::none();

  if (!f.on_host()) {
    if (workspace_bytes < cuda::workspace_bytes(a.items, in_double)) return py::none();
    {
      const py::gil_scoped_release unlocked;
      cuda::run_row_loss(queue, loss, input.dtype, a, r);
    }
    return py::bool_(true);
  }
  const Backend& backend = current_backend();
  double divisor;
  {
    const Unlocked unlocked(input.numel());
    divisor = run_row_loss(backend, loss, input.dtype, a, r);
  }
  return py::float_(divisor);
}

}  // namespace

void add_row_loss(py::module_& m) {
  m.def("row_loss", &row_loss, py::arg("fields"));
  m.attr("ROW_BLOCK") = MBK_ISA::kBlock;
  m.attr("ROW_LANES") = MBK_ISA::kGroup;
}

}  // namespace mbk::python
