// The Python module mbkern._C: what this build is, and the functions of python/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "losses/all.h"
#include "python/functions.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace {

template <class... L>
std::vector<std::string> names(mbk::MBK_ISA::LossList<L...>) {
  return {L::name...};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() =
      "The kernels. Not for use from outside mbkern: the launch modules are the only callers.";

  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"version", MBKERN_VERSION},
                                              {"git", MBKERN_GIT},
                                              {"compiler", MBKERN_COMPILER},
                                              {"cuda_archs", MBKERN_CUDA_ARCHS},
                                              {"cuda_toolkit", MBKERN_CUDA_TOOLKIT}};
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
  m.def("multirow_losses", [] { return names(mbk::MBK_ISA::MultirowLosses{}); });
  m.def("elementary_functions", [] {
    std::vector<std::string> found;
    for (const mbk::Elementary* f = mbk::current_backend().elementary; f->name; ++f)
      found.emplace_back(f->name);
    return found;
  });
  m.def("set_torch", &mbk::python::set_torch, py::arg("types"), py::arg("dtypes"),
        py::arg("exchange"));
  mbk::python::add_row_loss(m);
  mbk::python::add_pointwise_loss(m);
  mbk::python::add_plain_loss(m);
  mbk::python::add_multirow_loss(m);
  mbk::python::add_product(m);
  mbk::python::add_tensor_lists(m);
  mbk::python::add_arrays(m);
  mbk::python::add_cuda(m);
}
