// The shortest way of a loss: two plain tensors of one type and shape on the host, and no options.
// Everything that such a call asks torch for is asked from here, by torch's functions: at sizes
// that take the kernel a microsecond, a line of Python is seen.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "cpu/pointwise_call.h"
#include "python/fields.h"
#include "python/functions.h"
#include "python/pointwise.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

// Of torch, never released.
struct Functions {
  PyObject* watchers[3];
  PyObject *function_modes, *modes_watch;
  PyObject *saved_hooks, *is_grad_enabled, *threads, *empty_like;
  PyObject* scalars[2];     // of fp32 and fp64, to be like
  PyObject* requires_grad;  // interned
  std::int64_t most_bytes;
} functions;

PyObject* kept(const py::handle& object) {
  return py::reinterpret_borrow<py::object>(object).release().ptr();
}

void set_plain(const py::tuple& watchers, const py::function& function_modes,
               const py::function& modes_watch, const py::function& saved_hooks,
               const py::function& is_grad_enabled, const py::function& threads,
               const py::function& empty_like, const py::tuple& scalars, std::int64_t most_bytes) {
  for (int k = 0; k < 3; ++k) functions.watchers[k] = kept(watchers[k]);
  functions.function_modes = kept(function_modes);
  functions.modes_watch = kept(modes_watch);
  functions.saved_hooks = kept(saved_hooks);
  functions.is_grad_enabled = kept(is_grad_enabled);
  functions.threads = kept(threads);
  functions.empty_like = kept(empty_like);
  for (int k = 0; k < 2; ++k) functions.scalars[k] = kept(scalars[k]);
  functions.requires_grad = PyUnicode_InternFromString("requires_grad");
  functions.most_bytes = most_bytes;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Whether an answer is true: a count, a truth value, or an object or None.
bool is_yes(PyObject* result) {
  const py::object answer = checked(result);
  const int yes = PyObject_IsTrue(answer.ptr());
  if (yes < 0) throw py::error_already_set();
  return yes != 0;
}
bool says_yes(PyObject* function) { return is_yes(PyObject_CallNoArgs(function)); }

// Whether somebody is to see every operation: modes, transforms, tracing. A default device is a
// mode that need not.
bool is_watched() {
  for (PyObject* watcher : functions.watchers)
    if (says_yes(watcher)) return true;
  return says_yes(functions.function_modes) && says_yes(functions.modes_watch);
}

bool requires_grad(const py::handle& tensor) {
  return is_yes(PyObject_GetAttr(tensor.ptr(), functions.requires_grad));
}

// The loss's own numbers, checked by the caller.
template <int n>
void read_numbers(const py::tuple& numbers, double (&values)[n]) {
  if (numbers.size() > n) throw std::invalid_argument("mbkern._C: parameters are a short tuple");
  for (std::size_t k = 0; k < numbers.size(); ++k) values[k] = numbers[k].cast<double>();
}

py::object new_like(PyObject* tensor) {
  return checked(PyObject_CallOneArg(functions.empty_like, tensor));
}

// `loss` is the number of an element-wise loss, or -1: no plain call, whatever the tensors are.
// Returns 0: the tensors are not plain; 1: they are, but the call is not; else the loss and a tuple
// of the two gradients, formed for an incoming gradient of 1, None where none is wanted.
py::object plain_loss(int loss, const py::handle& first, const py::handle& second,
                      bool differentiates_second, int reduction, const py::tuple& parameters) {
  if (!reads_by_table()) return py::int_(0);
  int device = kNoDevice;
  const Tensor a(first.ptr(), device), b(second.ptr(), device);
  const bool alike = a.kind == Tensor::Kind::floating && b.is(a.dtype) && b.same_shape(a);
  if (!alike || is_watched()) return py::int_(0);
  const bool has_graph = says_yes(functions.is_grad_enabled);
  const bool wants[2] = {has_graph && requires_grad(first), has_graph && requires_grad(second)};
  if (wants[1] && !differentiates_second) return py::int_(0);

  const bool in_double = a.dtype == DType::f64;
  const std::int64_t bytes = a.numel() * (in_double ? 8 : 4);
  if (loss < 0 || device != kHost || !(in_double || a.dtype == DType::f32) ||
      bytes > functions.most_bytes || is_yes(PyObject_CallOneArg(functions.saved_hooks, Py_False)))
    return py::int_(1);
  const py::object value = new_like(functions.scalars[in_double]);
  const py::object grads[2] = {wants[0] ? new_like(first.ptr()) : py::none(),
                               wants[1] ? new_like(second.ptr()) : py::none()};
  const auto no = Tensor::Negated::no;
  const Tensor result(value.ptr(), device, no), absent(Py_None, device);
  const Tensor grad_first(grads[0].ptr(), device, no), grad_second(grads[1].ptr(), device, no);
  const Views views = {&a,      &b,      &absent,     &absent,      &absent,
                       &absent, &absent, &grad_first, &grad_second, &absent};
  PointwiseArgs args{};
  for (int v = 0; v < kViews; ++v)
    if (*views[v]) args.views[v].data = views[v]->data, args.views[v].dtype = a.dtype;
  if (!merge(views, args)) return py::int_(1);
  read_numbers(parameters, args.parameters);
  args.scale = {1.0, nullptr, DType::f64};
  args.threads =
      static_cast<int>(PyLong_AsLong(checked(PyObject_CallNoArgs(functions.threads)).ptr()));
  Result r{};
  r.reduction = static_cast<Reduction>(reduction);
  r.loss = result.data, r.loss_dtype = a.dtype;
  const Backend& backend = current_backend();
  {
    const Unlocked unlocked(a.numel());
    run_pointwise_loss(backend, loss, a.dtype, args, r);
  }
  return py::make_tuple(value, py::make_tuple(grads[0], grads[1]));
}

}  // namespace

void add_plain_loss(py::module_& m) {
  m.def("set_plain", &set_plain, py::kw_only(), py::arg("watchers"), py::arg("function_modes"),
        py::arg("modes_watch"), py::arg("saved_hooks"), py::arg("is_grad_enabled"),
        py::arg("threads"), py::arg("empty_like"), py::arg("scalars"), py::arg("most_bytes"));
  m.def("plain_loss", &plain_loss, py::arg("loss"), py::arg("first"), py::arg("second"),
        py::arg("differentiates_second"), py::arg("reduction"), py::arg("parameters"));
}

}  // namespace mbk::python
