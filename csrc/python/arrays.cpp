// Over addresses, on the host: exact sums, whole arrays, elementary functions.
#include "cpu/arrays.h"

#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

#include "core/environment.h"
#include "cpu/dispatch.h"
#include "cpu/reduction.h"
#include "python/fields.h"
#include "python/functions.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

py::object exact_result(Address state, const py::tuple& fields) {
  Fields f(fields);
  Result r{};
  const bool good = f.result(r);
  f.finish();
  if (!good) return py::none();
  const DefaultEnvironment environment;
  const double divisor = divisor_of(r, 1);
  store_result(r, *at<ExactSumState>(state), divisor);
  return py::float_(divisor);
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
  const Backend& backend = find_backend(isa);
  for (const Elementary* f = backend.elementary; f->name; ++f) {
    if (name != f->name) continue;
    const py::gil_scoped_release release;
    const DefaultEnvironment environment;
    in_double ? f->f64(at<double>(x), at<double>(y), n) : f->f32(at<float>(x), at<float>(y), n);
    return;
  }
  throw std::invalid_argument("mbkern: no elementary function '" + name + "'");
}

// The value of a floating 0-dim tensor on the host; None for anything else.
py::object scalar_value(const py::object& object) {
  int device = kNoDevice;
  const Tensor t(object.ptr(), device);
  if (device != kHost || t.kind != Tensor::Kind::floating || t.dims != 0) return py::none();
  const DefaultEnvironment environment;  // or a denormal float, and every small half, is 0
  return py::float_(read_scalar({0, t.data, t.dtype}));
}

}  // namespace

void add_arrays(py::module_& m) {
  m.def("scalar_value", &scalar_value, py::arg("tensor"));
  m.def("elementary", &elementary, py::arg("isa"), py::arg("name"), py::arg("in_double"),
        py::arg("x"), py::arg("y"), py::arg("n"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));

  m.def(
      "exact_value",
      [](Address s) {
        const DefaultEnvironment environment;
        return mbk::exact_value(*at<ExactSumState>(s));
      },
      py::arg("state"));
  m.def("exact_result", &exact_result, py::arg("state"), py::arg("fields"));
  m.def(
      "exact_merge",
      [](Address into, Address from) {
        mbk::exact_merge(*at<ExactSumState>(into), *at<ExactSumState>(from));
      },
      py::arg("into"), py::arg("other"));
  m.def(
      "exact_add",
      [](Address s, Address values, std::int64_t n) {
        const py::gil_scoped_release release;
        const DefaultEnvironment environment;
        mbk::exact_add(*at<ExactSumState>(s), at<float>(values), n);
      },
      py::arg("state"), py::arg("values"), py::arg("n"));

  m.def(
      "scale_array",
      [](Address x, int dtype, std::int64_t n, double factor, int threads) {
        const py::gil_scoped_release release;
        const DefaultEnvironment environment;
        mbk::scale_array(at<void>(x), static_cast<DType>(dtype), n, factor, threads);
      },
      py::arg("x"), py::arg("dtype"), py::arg("n"), py::arg("factor"), py::arg("threads"));
  m.def(
      "convert_array",
      [](Address from, int from_dtype, Address to, int to_dtype, std::int64_t n, int threads) {
        const py::gil_scoped_release release;
        mbk::convert_array(at<void>(from), static_cast<DType>(from_dtype), at<void>(to),
                           static_cast<DType>(to_dtype), n, threads);
      },
      py::arg("source"), py::arg("source_dtype"), py::arg("to"), py::arg("to_dtype"), py::arg("n"),
      py::arg("threads"));
}

}  // namespace mbk::python
