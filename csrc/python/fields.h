#pragma once
// The fields of a call, in order, out of one flat tuple: a fraction of the time of as many
// arguments. The callers build the tuples in the order in which they are read here.
#include <pybind11/pybind11.h>

#include <optional>

#include "core/environment.h"
#include "cpu/reduction.h"
#include "cuda/calls.h"
#include "python/tensor.h"

namespace mbk::python {

class Fields {
 public:
  explicit Fields(const pybind11::tuple& fields) : fields_(fields) {}
  // Throws unless every field was read and was there, and was what it was read as.
  void finish() const {
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    if (next_ != PyTuple_GET_SIZE(fields_.ptr()))
      throw std::invalid_argument("mbkern._C: wrong number of fields; the callers differ");
  }
  std::int64_t integer() {
    const std::int64_t value = PyLong_AsLongLong(get());
    if (value == -1) check();
    return value;
  }
  double number() { return as_number(get()); }
  // A number; None: absent.
  double number(bool& present) {
    PyObject* field = get();
    present = field != Py_None;
    return present ? as_number(field) : 0;
  }
  // A tuple of as many numbers, or fewer; the rest is 0.
  template <int n>
  void numbers(double (&values)[n]) {
    PyObject* field = get();
    const Py_ssize_t count = PyTuple_Check(field) ? PyTuple_GET_SIZE(field) : n + 1;
    if (count > n) throw std::invalid_argument("mbkern._C: parameters are a short tuple");
    for (Py_ssize_t k = 0; k < count; ++k) values[k] = as_number(PyTuple_GET_ITEM(field, k));
  }
  // False if a number was given as a tensor: Python would read it, and lose its derivative.
  bool numbers() const { return numbers_; }
  bool boolean() { return integer() != 0; }
  void* address() {
    void* const value = PyLong_AsVoidPtr(get());
    if (!value) check();
    return value;
  }
  // The first tensor must not be a scalar's: it sets the device of the call.
  Tensor tensor() { return Tensor(get(), device_); }
  Tensor output() { return Tensor(get(), device_, Tensor::Negated::no); }
  // A list of tensors: calls f(position, tensor) for each, and returns how many there are.
  template <class F>
  std::int64_t tensors(bool are_outputs, F f) {
    const Tensor::Negated negated =
        are_outputs ? Tensor::Negated::ask_if_strided : Tensor::Negated::ask;
    PyObject* list = get();
    if (!PyList_CheckExact(list)) throw std::invalid_argument("mbkern._C: not a list of tensors");
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(list); ++k)
      f(k, Tensor(PyList_GET_ITEM(list, k), device_, negated));
    return PyList_GET_SIZE(list);
  }
  // The same, or None: -1.
  template <class F>
  std::int64_t tensors_if_any(bool are_outputs, F f) {
    return is_absent() ? -1 : tensors(are_outputs, f);
  }
  // Whether the next field is None, which is passed over.
  bool is_absent() {
    const bool absent = next_ < PyTuple_GET_SIZE(fields_.ptr()) &&
                        PyTuple_GET_ITEM(fields_.ptr(), next_) == Py_None;
    next_ += absent;
    return absent;
  }
  // One number for each of `count` things, or one for all: calls f(position, number).
  template <class F>
  void number_each(std::int64_t count, F f) {
    PyObject* field = get();
    const bool list = PyList_CheckExact(field);
    if (list && PyList_GET_SIZE(field) != count)
      throw std::invalid_argument("mbkern._C: wrong number of numbers; the callers differ");
    for (std::int64_t k = 0; k < count; ++k)
      f(k, as_number(list ? PyList_GET_ITEM(field, k) : field));
  }
  // How many tensors the list has that is read next.
  std::size_t list_size() const {
    if (next_ >= PyTuple_GET_SIZE(fields_.ptr())) return 0;
    PyObject* list = PyTuple_GET_ITEM(fields_.ptr(), next_);
    return PyList_CheckExact(list) ? static_cast<std::size_t>(PyList_GET_SIZE(list)) : 0;
  }
  bool on_host() const { return device_ == kHost; }
  // A number or a 0-dim tensor; None: absent. False where it is neither, or lies on another device.
  // One on the host is read now if the call is the device's: that waits for nothing.
  bool scalar(Scalar& s, bool& present) {
    PyObject* field = get();
    present = field != Py_None;
    if (!present) return true;
    if (PyFloat_CheckExact(field) || PyLong_CheckExact(field)) {
      s = {as_number(field), nullptr, DType::f64};
      return true;
    }
    int device = kNoDevice;
    const Tensor tensor(field, device);
    s = {0, tensor.data, tensor.dtype};
    if (tensor.kind != Tensor::Kind::floating || tensor.dims != 0) return false;
    if (device != device_ && device == kHost) {
      const DefaultEnvironment environment;
      s = {read_scalar(s), nullptr, DType::f64};
      return true;
    }
    return device == device_;
  }
  bool scalar(Scalar& s) {
    bool present;
    return scalar(s, present) && present;
  }
  // Whether the device would read one of the scalars while it writes over it.
  bool overwrites(const Tensor& output, const Scalar& a, const Scalar& b) const {
    return !on_host() && (output.spans(a.pointer) || output.spans(b.pointer));
  }
  // Where results go: the reduction, the mean's divisor, the loss, and the sum of the terms.
  bool result(Result& r) {
    r.reduction = static_cast<Reduction>(integer());
    const bool known = scalar(r.denominator, r.has_denominator);
    const Tensor loss = output(), sum = output();
    r.loss = loss.data, r.loss_dtype = loss.dtype;
    r.loss_sum = static_cast<ExactSumState*>(sum.data);
    return known && loss.kind <= Tensor::Kind::floating && sum.kind != Tensor::Kind::unsuited;
  }
  // The workspace and the stream of a call on CUDA (None and 0 on the host).
  bool queue(cuda::Queue& queue, std::int64_t& bytes) {
    const Tensor workspace = tensor();
    queue = {address(), workspace.data};
    bytes = workspace ? workspace.numel() * static_cast<std::int64_t>(sizeof(double)) : 0;
    return !workspace || workspace.is(DType::f64);
  }

 private:
  // At once: reading a tensor clears an error that is pending.
  static void check() {
    if (PyErr_Occurred()) throw pybind11::error_already_set();
  }
  double as_number(PyObject* field) {
    if (is_tensor(field)) {
      numbers_ = false;
      return 0;
    }
    const double value = PyFloat_AsDouble(field);
    if (value == -1) check();
    return value;
  }
  PyObject* get() {
    if (next_ < PyTuple_GET_SIZE(fields_.ptr())) return PyTuple_GET_ITEM(fields_.ptr(), next_++);
    ++next_;  // finish() will see it
    return Py_None;
  }
  const pybind11::tuple& fields_;
  Py_ssize_t next_ = 0;
  int device_ = kNoDevice;
  bool numbers_ = true;
};

// Lets other Python threads run, where that is worth its time; on a device always: a launch waits
// while the queue is full, perhaps for a callback that wants to run.
class Unlocked {
 public:
  explicit Unlocked(std::int64_t elements, bool on_host = true) {
    constexpr std::int64_t kWorthwhile = 4096;
    if (elements >= kWorthwhile || !on_host) release_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> release_;
};

}  // namespace mbk::python
