// The Python module mbkern._C. row_loss and pointwise_loss take tensors, and return None for what
// they cannot compute: their callers in python/mbkern/_launch*.py then say why, or help. The other
// functions take addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/environment.h"
#include "cpu/arrays.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/pointwise_call.h"
#include "cpu/row_call.h"
#include "losses/all.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using mbk::python::item_strides;
using mbk::python::Tensor;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// The fields of a call, in order, out of one flat tuple: a fraction of the time of as many
// arguments. The callers build the tuples in the order in which they are read here.
class Fields {
 public:
  explicit Fields(const py::tuple& fields) : fields_(fields) {}
  // Throws unless every field was read and was there, and was what it was read as.
  void finish() const {
    if (PyErr_Occurred()) throw py::error_already_set();
    if (next_ != PyTuple_GET_SIZE(fields_.ptr()))
      throw std::invalid_argument("mbkern._C: wrong number of fields; the callers differ");
  }
  std::int64_t integer() { return PyLong_AsLongLong(get()); }
  double number() { return as_number(get()); }
  // A number; None: absent.
  double number(bool& present) {
    PyObject* field = get();
    present = field != Py_None;
    return present ? as_number(field) : 0;
  }
  bool numbers() const { return numbers_; }
  bool boolean() { return integer() != 0; }
  void* address() { return PyLong_AsVoidPtr(get()); }
  mbk::DType dtype() { return static_cast<mbk::DType>(integer()); }
  Tensor tensor() { return Tensor(get()); }
  // A number or a 0-dim tensor; None: absent. False where it is neither.
  bool scalar(mbk::Scalar& s, bool& present) {
    PyObject* field = get();
    present = field != Py_None;
    if (!present) return true;
    if (PyFloat_CheckExact(field) || PyLong_CheckExact(field)) {
      s = {PyFloat_AsDouble(field), nullptr, mbk::DType::f64};
      return true;
    }
    const Tensor tensor(field);
    s = {0, tensor.data, tensor.dtype};
    return tensor.kind == Tensor::Kind::floating && tensor.dims == 0;
  }
  bool scalar(mbk::Scalar& s) {
    bool present;
    return scalar(s, present) && present;
  }
  // Where results go: the reduction, the mean's divisor, the loss, and the sum of the terms.
  bool result(mbk::Result& r) {
    r.reduction = static_cast<mbk::Reduction>(integer());
    const bool known = scalar(r.denominator, r.has_denominator);
    const Tensor loss = tensor(), sum = tensor();
    r.loss = loss.data, r.loss_dtype = loss.dtype;
    r.loss_sum = static_cast<mbk::ExactSumState*>(sum.data);
    return known && loss.kind <= Tensor::Kind::floating && sum.kind != Tensor::Kind::unsuited;
  }

 private:
  // Python would read a tensor as a number, and lose that it is differentiated.
  double as_number(PyObject* field) {
    numbers_ = numbers_ && !mbk::python::is_tensor(field);
    return PyFloat_AsDouble(field);
  }
  PyObject* get() {
    if (next_ < PyTuple_GET_SIZE(fields_.ptr())) return PyTuple_GET_ITEM(fields_.ptr(), next_++);
    ++next_;  // finish() will see it
    return Py_None;
  }
  const py::tuple& fields_;
  Py_ssize_t next_ = 0;
  bool numbers_ = true;
};

// Lets other Python threads run, where that is worth its time.
class Unlocked {
 public:
  explicit Unlocked(std::int64_t elements) {
    constexpr std::int64_t kWorthwhile = 4096;
    if (elements >= kWorthwhile) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

// One value an item, in the type that the loss is computed in.
bool per_item(const Tensor& t, const Tensor& input, bool in_double, const void*& data,
              mbk::Strides& strides) {
  if (!t) return true;
  data = t.data;
  const int dims = input.dims > 1 ? input.dims - 1 : 0;
  bool good = t.is(in_double ? mbk::DType::f64 : mbk::DType::f32) && t.dims == dims;
  for (int d = 0; good && d < dims; ++d) good = t.shape[d] == input.shape[d ? d + 1 : 0];
  return good && item_strides(t, false, strides);
}

// Contiguous output of a given type and size; absent is good too.
bool dense(const Tensor& t, bool in_double, std::int64_t n, void*& data) {
  data = t.data;
  return !t || (t.is(in_double ? mbk::DType::f64 : mbk::DType::f32) && t.numel() == n);
}

// Returns the divisor of a mean; None, with nothing written, for what is not suited.
py::object row_loss(const py::tuple& fields) {
  Fields f(fields);
  mbk::RowArgs a{};
  mbk::Result r{};
  const int loss = static_cast<int>(f.integer());
  const Tensor input = f.tensor(), target = f.tensor(), weight = f.tensor();
  const Tensor sample_weight = f.tensor(), grad = f.tensor(), item_scale = f.tensor();
  const Tensor losses = f.tensor(), state = f.tensor();
  a.accumulate = f.boolean(), a.from_state = f.boolean(), a.ignore_index = f.integer();
  a.label_smoothing = f.number(), a.z_loss = f.number();
  bool capped = false;
  a.softcap = f.number(capped);
  bool good = f.scalar(a.scale);
  a.denominator = {f.number(), nullptr, mbk::DType::f64};
  good = f.result(r) && good;
  a.threads = static_cast<int>(f.integer());
  f.finish();

  using Kind = Tensor::Kind;
  good = good && f.numbers();
  if (!good || input.kind != Kind::floating || input.dims < 1) return py::none();
  const bool in_double = input.dtype == mbk::DType::f64;
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
    good = weight.is(in_double ? mbk::DType::f64 : mbk::DType::f32) && weight.dims == 1 &&
           weight.shape[0] == a.columns && (weight.strides[0] == 1 || a.columns <= 1);
  good =
      good && per_item(sample_weight, input, in_double, a.sample_weight, a.sample_weight_strides);
  good = good && per_item(item_scale, input, in_double, a.item_scale, a.item_scale_strides);
  if (good && grad) {
    a.grad = grad.data;
    const mbk::DType wanted = !a.accumulate ? input.dtype
                              : in_double   ? mbk::DType::f64
                                            : mbk::DType::f32;
    good = grad.is(wanted) && grad.same_shape(input) && item_strides(grad, true, a.grad_strides);
  }
  const std::int64_t saved = a.target_is_index ? 2 : 3;
  good = good && dense(losses, in_double, a.items, a.losses) &&
         dense(state, in_double, saved * a.items, a.row_state) && (!a.from_state || state) &&
         (!r.loss_sum || !in_double);
  good = good && a.label_smoothing >= 0 && a.label_smoothing <= 1 &&
         (!capped || (a.softcap > 0 && a.softcap < HUGE_VAL));
  if (!good) return py::none();

  const mbk::Backend& backend = mbk::current_backend();
  double divisor;
  {
    const Unlocked unlocked(input.numel());
    divisor = mbk::run_row_loss(backend, loss, input.dtype, a, r);
  }
  return py::float_(divisor);
}

// Dimensions of size 1 are dropped, and those merged that are one in every view.
bool merge(const std::vector<const Tensor*>& views, mbk::PointwiseArgs& a) {
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
    for (int v = 0; one && v < mbk::kViews; ++v)
      one = !*views[v] || a.views[v].strides[a.dims - 1] == views[v]->strides[d] * size;
    if (!one && a.dims == mbk::kMaxDims) return false;
    if (!one) a.shape[a.dims++] = 1;
    a.shape[a.dims - 1] *= size;
    for (int v = 0; v < mbk::kViews; ++v)
      if (*views[v]) a.views[v].strides[a.dims - 1] = views[v]->strides[d];
  }
  return true;
}

// Returns the divisor of a mean; None, with nothing written, for what is not suited.
py::object pointwise_loss(const py::tuple& fields) {
  Fields f(fields);
  mbk::PointwiseArgs a{};
  mbk::Result r{};
  const int loss = static_cast<int>(f.integer());
  const Tensor input = f.tensor(), target = f.tensor(), weight = f.tensor();
  const Tensor item_scale = f.tensor(), losses = f.tensor();
  const Tensor grad_input = f.tensor(), grad_target = f.tensor();
  a.accumulate = f.boolean(), a.parameter = f.number();
  bool good = f.scalar(a.scale);
  good = f.result(r) && good;
  a.threads = static_cast<int>(f.integer());
  f.finish();

  using Kind = Tensor::Kind;
  good = good && f.numbers();
  if (!good || input.kind != Kind::floating || target.kind != Kind::floating) return py::none();
  const std::vector<const Tensor*> views = {&input,  &target,     &weight,     &item_scale,
                                            &losses, &grad_input, &grad_target};
  const mbk::DType type =
      input.is(mbk::DType::f64) || target.is(mbk::DType::f64) ? mbk::DType::f64 : mbk::DType::f32;
  for (int v = 0; v < mbk::kViews; ++v) {
    const Tensor& t = *views[v];
    if (!t) continue;
    if (t.kind != Kind::floating || !t.same_shape(input)) return py::none();
    a.views[v].data = t.data, a.views[v].dtype = t.dtype;
    if ((v == mbk::kWeight || v == mbk::kItemScale) && t.dtype != type) return py::none();
  }
  if ((r.loss_sum && type == mbk::DType::f64) || !merge(views, a)) return py::none();

  const mbk::Backend& backend = mbk::current_backend();
  double divisor;
  {
    const Unlocked unlocked(input.numel());
    divisor = mbk::run_pointwise_loss(backend, loss, type, a, r);
  }
  return py::float_(divisor);
}

py::object exact_result(Address state, const py::tuple& fields) {
  Fields f(fields);
  mbk::Result r{};
  const bool good = f.result(r);
  f.finish();
  if (!good) return py::none();
  const mbk::DefaultEnvironment environment;
  const double divisor = mbk::divisor_of(r, 1);
  mbk::store_result(r, *at<mbk::ExactSumState>(state), divisor);
  return py::float_(divisor);
}

template <class... L>
std::vector<std::string> names(mbk::MBK_ISA::LossList<L...>) {
  return {L::name...};
}

// Asks for huge pages under [address, address + bytes) before they are touched; a hint, errors are
// none.
void advise_huge_pages(Address address, std::size_t bytes) {
  const Address page = static_cast<Address>(sysconf(_SC_PAGESIZE));
  const Address first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
}

void elementary(const std::string& isa, const std::string& name, bool in_double, Address x,
                Address y, std::int64_t n) {
  const mbk::Backend& backend = mbk::find_backend(isa);
  for (const mbk::Elementary* f = backend.elementary; f->name; ++f) {
    if (name != f->name) continue;
    const py::gil_scoped_release release;
    const mbk::DefaultEnvironment environment;
    in_double ? f->f64(at<double>(x), at<double>(y), n) : f->f32(at<float>(x), at<float>(y), n);
    return;
  }
  throw std::invalid_argument("mbkern: no elementary function '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels over addresses. Not for use from outside mbkern: nothing is checked here.";

  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"version", MBKERN_VERSION},
                                              {"git", MBKERN_GIT},
                                              {"compiler", MBKERN_COMPILER},
                                              {"cuda_archs", MBKERN_CUDA_ARCHS}};
  });
  m.def("isas", [] {
    std::vector<std::string> found;
    for (const mbk::Backend* b : mbk::available_backends()) found.emplace_back(b->name);
    return found;
  });
  m.def("isa", [] { return std::string(mbk::current_backend().name); });
  m.def("set_isa", &mbk::set_current_backend, py::arg("name"));
  m.def("has_openmp", &mbk::has_openmp);
  m.def("row_losses", [] { return names(mbk::MBK_ISA::RowLosses{}); });
  m.def("pointwise_losses", [] { return names(mbk::MBK_ISA::PointwiseLosses{}); });
  m.def("elementary_functions", [] {
    std::vector<std::string> found;
    for (const mbk::Elementary* f = mbk::current_backend().elementary; f->name; ++f)
      found.emplace_back(f->name);
    return found;
  });
  m.def("elementary", &elementary, py::arg("isa"), py::arg("name"), py::arg("in_double"),
        py::arg("x"), py::arg("y"), py::arg("n"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));

  m.def(
      "exact_value", [](Address s) { return mbk::exact_value(*at<mbk::ExactSumState>(s)); },
      py::arg("state"));
  m.def("exact_result", &exact_result, py::arg("state"), py::arg("fields"));
  m.def(
      "exact_merge",
      [](Address into, Address from) {
        mbk::exact_merge(*at<mbk::ExactSumState>(into), *at<mbk::ExactSumState>(from));
      },
      py::arg("into"), py::arg("other"));
  m.def(
      "exact_add",
      [](Address s, Address values, std::int64_t n) {
        const py::gil_scoped_release release;
        const mbk::DefaultEnvironment environment;
        mbk::exact_add(*at<mbk::ExactSumState>(s), at<float>(values), n);
      },
      py::arg("state"), py::arg("values"), py::arg("n"));

  m.def(
      "scale_array",
      [](Address x, int dtype, std::int64_t n, double factor, int threads) {
        const py::gil_scoped_release release;
        mbk::scale_array(at<void>(x), static_cast<mbk::DType>(dtype), n, factor, threads);
      },
      py::arg("x"), py::arg("dtype"), py::arg("n"), py::arg("factor"), py::arg("threads"));
  m.def(
      "convert_array",
      [](Address from, int from_dtype, Address to, int to_dtype, std::int64_t n, int threads) {
        const py::gil_scoped_release release;
        mbk::convert_array(at<void>(from), static_cast<mbk::DType>(from_dtype), at<void>(to),
                           static_cast<mbk::DType>(to_dtype), n, threads);
      },
      py::arg("source"), py::arg("source_dtype"), py::arg("to"), py::arg("to_dtype"), py::arg("n"),
      py::arg("threads"));

  m.def("set_torch", &mbk::python::set_torch, py::arg("types"), py::arg("dtypes"),
        py::arg("exchange"));
  m.def("row_loss", &row_loss, py::arg("fields"));
  m.def("pointwise_loss", &pointwise_loss, py::arg("fields"));
}
