// The Python module mbkern._C: plain functions over addresses and numbers. The only file that knows
// pybind11; all checks of tensors are in python/mbkern/_launch*.py, its only callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
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

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// The fields of a call, in order, out of a flat tuple of ints and a flat tuple of floats: a
// fraction of the time of as many arguments. _launch.py builds the tuples in the order in which
// they are read here.
class Fields {
 public:
  Fields(const py::tuple& integers, const py::tuple& numbers)
      : integers_(integers), numbers_(numbers) {}
  // Throws unless every field was read and was there, and was a number.
  void finish() const {
    if (PyErr_Occurred()) throw py::error_already_set();
    if (next_integer_ != PyTuple_GET_SIZE(integers_.ptr()) ||
        next_number_ != PyTuple_GET_SIZE(numbers_.ptr()))
      throw std::invalid_argument(
          "mbkern._C: wrong number of fields; _launch.py and bindings.cpp differ");
  }
  std::int64_t integer() {
    PyObject* field = get(integers_, next_integer_++);
    return field ? PyLong_AsLongLong(field) : 0;
  }
  double number() {
    PyObject* field = get(numbers_, next_number_++);
    return field ? PyFloat_AsDouble(field) : 0;
  }
  bool boolean() { return integer() != 0; }
  void* address() {
    PyObject* field = get(integers_, next_integer_++);
    return field ? PyLong_AsVoidPtr(field) : nullptr;
  }
  mbk::DType dtype() { return static_cast<mbk::DType>(integer()); }
  mbk::Strides strides() {
    const std::int64_t outer = integer(), inner = integer(), column = integer();
    return {outer, inner, column};
  }
  mbk::Scalar scalar() {
    const double value = number();
    const void* pointer = address();
    return {value, pointer, dtype()};
  }
  mbk::Result result() {
    mbk::Result r{};
    r.reduction = static_cast<mbk::Reduction>(integer());
    r.has_denominator = boolean();
    r.denominator = scalar();
    r.loss = address();
    r.loss_dtype = dtype();
    r.loss_sum = static_cast<mbk::ExactSumState*>(address());
    return r;
  }

 private:
  static PyObject* get(const py::tuple& fields, Py_ssize_t i) {
    return i < PyTuple_GET_SIZE(fields.ptr()) ? PyTuple_GET_ITEM(fields.ptr(), i) : nullptr;
  }
  const py::tuple &integers_, &numbers_;
  Py_ssize_t next_integer_ = 0, next_number_ = 0;
};

double row_loss(const py::tuple& integers, const py::tuple& numbers) {
  Fields f(integers, numbers);
  mbk::RowArgs a{};
  const int loss = static_cast<int>(f.integer());
  const mbk::DType dtype = f.dtype();
  a.items = f.integer(), a.inner_size = f.integer(), a.columns = f.integer();
  a.input = f.address(), a.input_strides = f.strides();
  a.grad = f.address(), a.grad_strides = f.strides(), a.accumulate = f.boolean();
  a.target = f.address();
  const std::int64_t target_type = f.integer();  // -1: probabilities
  a.target_is_index = target_type >= 0;
  a.target_type = static_cast<mbk::IndexType>(target_type < 0 ? 0 : target_type);
  a.target_strides = f.strides(), a.ignore_index = f.integer();
  a.class_weight = f.address();
  a.sample_weight = f.address(), a.sample_weight_strides = f.strides();
  a.label_smoothing = f.number(), a.z_loss = f.number(), a.softcap = f.number();
  a.scale = f.scalar();
  a.item_scale = f.address(), a.item_scale_strides = f.strides();
  a.losses = f.address(), a.row_state = f.address(), a.from_state = f.boolean();
  a.denominator = {f.number(), nullptr, mbk::DType::f64};
  const mbk::Result r = f.result();
  a.threads = static_cast<int>(f.integer());
  f.finish();
  const mbk::Backend& backend = mbk::current_backend();
  const py::gil_scoped_release release;
  return mbk::run_row_loss(backend, loss, dtype, a, r);
}

double pointwise_loss(const py::tuple& integers, const py::tuple& numbers, const py::tuple& shape,
                      const py::list& view_strides) {
  Fields f(integers, numbers);
  mbk::PointwiseArgs a{};
  const int loss = static_cast<int>(f.integer());
  const mbk::DType type = f.dtype();
  if (shape.size() > mbk::kMaxDims || view_strides.size() != mbk::kViews)
    throw std::invalid_argument("mbkern: " + std::to_string(shape.size()) +
                                " dimensions; at most " + std::to_string(mbk::kMaxDims) +
                                " are supported for layouts that do not merge");
  a.dims = static_cast<int>(shape.size());
  for (int d = 0; d < a.dims; ++d) a.shape[d] = shape[d].cast<std::int64_t>();
  for (int v = 0; v < mbk::kViews; ++v) {
    a.views[v].data = f.address();
    a.views[v].dtype = f.dtype();
    if (!a.views[v].data) continue;
    const py::tuple strides = view_strides[v];
    for (int d = 0; d < a.dims; ++d) a.views[v].strides[d] = strides[d].cast<std::int64_t>();
  }
  a.accumulate = f.boolean(), a.parameter = f.number(), a.scale = f.scalar();
  const mbk::Result r = f.result();
  a.threads = static_cast<int>(f.integer());
  f.finish();
  const mbk::Backend& backend = mbk::current_backend();
  const py::gil_scoped_release release;
  return mbk::run_pointwise_loss(backend, loss, type, a, r);
}

double exact_result(Address state, const py::tuple& integers, const py::tuple& numbers) {
  Fields f(integers, numbers);
  const mbk::Result r = f.result();
  f.finish();
  const mbk::DefaultEnvironment environment;
  const double divisor = mbk::divisor_of(r, 1);
  mbk::store_result(r, *at<mbk::ExactSumState>(state), divisor);
  return divisor;
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
      "scalar_value",
      [](Address address, int dtype) {
        return mbk::read_scalar({0, at<void>(address), static_cast<mbk::DType>(dtype)});
      },
      py::arg("address"), py::arg("dtype"));
  m.def(
      "exact_value", [](Address s) { return mbk::exact_value(*at<mbk::ExactSumState>(s)); },
      py::arg("state"));
  m.def("exact_result", &exact_result, py::arg("state"), py::arg("integers"), py::arg("numbers"));
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

  m.def("row_loss", &row_loss, py::arg("integers"), py::arg("numbers"));
  m.def("pointwise_loss", &pointwise_loss, py::arg("integers"), py::arg("numbers"),
        py::arg("shape"), py::arg("view_strides"));
}
