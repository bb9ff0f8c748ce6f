// The Python module mbkern._C: plain functions over addresses and numbers. The only file that knows
// pybind11; all checks of tensors are in python/mbkern/_launch.py, which is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <string>
#include <vector>

#include "core/environment.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/pointwise_call.h"
#include "cpu/row_call.h"
#include "losses/all.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Three = std::array<std::int64_t, 3>;
// (value, address or 0, dtype): see mbk::Scalar.
using ScalarTuple = std::tuple<double, Address, int>;
// (reduction, has_denominator, denominator, address of the loss, its dtype, address of the loss sum)
using ResultTuple = std::tuple<int, bool, ScalarTuple, Address, int, Address>;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}
mbk::Scalar scalar(const ScalarTuple& s) {
  return {std::get<0>(s), at<const void>(std::get<1>(s)), static_cast<mbk::DType>(std::get<2>(s))};
}
mbk::Strides strides(const Three& s) { return {s[0], s[1], s[2]}; }
mbk::Result result_of(const ResultTuple& r) {
  return {static_cast<mbk::Reduction>(std::get<0>(r)), scalar(std::get<2>(r)), std::get<1>(r),
          at<void>(std::get<3>(r)), static_cast<mbk::DType>(std::get<4>(r)),
          at<mbk::ExactSumState>(std::get<5>(r))};
}

double row_loss(int loss, int dtype, std::int64_t items, std::int64_t inner_size, std::int64_t columns, Address input,
                const Three& input_strides, Address grad, const Three& grad_strides, bool accumulate, Address target,
                int target_type, const Three& target_strides, std::int64_t ignore_index, Address class_weight,
                Address sample_weight, const Three& sample_weight_strides, double label_smoothing, double z_loss,
                double softcap, const ScalarTuple& scale, Address item_scale, const Three& item_scale_strides,
                Address losses, Address row_state, bool from_state, const ScalarTuple& divisor,
                const ResultTuple& result, int threads) {
  mbk::RowArgs a{};
  a.items = items, a.inner_size = inner_size, a.columns = columns;
  a.input = at<void>(input), a.input_strides = strides(input_strides);
  a.grad = at<void>(grad), a.grad_strides = strides(grad_strides), a.accumulate = accumulate;
  a.target = at<void>(target), a.target_strides = strides(target_strides);
  a.target_is_index = target_type >= 0;
  a.target_type = static_cast<mbk::IndexType>(target_type < 0 ? 0 : target_type);
  a.ignore_index = ignore_index;
  a.class_weight = at<void>(class_weight);
  a.sample_weight = at<void>(sample_weight), a.sample_weight_strides = strides(sample_weight_strides);
  a.label_smoothing = label_smoothing, a.z_loss = z_loss, a.softcap = softcap;
  a.scale = scalar(scale), a.denominator = scalar(divisor);
  a.item_scale = at<void>(item_scale), a.item_scale_strides = strides(item_scale_strides);
  a.losses = at<void>(losses), a.row_state = at<void>(row_state), a.from_state = from_state;
  a.threads = threads;
  const mbk::Result r = result_of(result);
  const py::gil_scoped_release release;
  return mbk::run_row_loss(mbk::current_backend(), loss, static_cast<mbk::DType>(dtype), a, r);
}

double pointwise_loss(int loss, bool in_double, const std::vector<std::int64_t>& shape,
                      const std::array<Address, mbk::kViews>& data, const std::array<int, mbk::kViews>& dtypes,
                      const std::vector<std::vector<std::int64_t>>& view_strides, bool accumulate, double parameter,
                      const ScalarTuple& scale, const ResultTuple& result, int threads) {
  mbk::PointwiseArgs a{};
  if (shape.size() > mbk::kMaxDims || view_strides.size() != mbk::kViews)
    throw std::invalid_argument("mbkern: " + std::to_string(shape.size()) + " dimensions that cannot be merged; at most " +
                                std::to_string(mbk::kMaxDims) + " are supported");
  a.dims = static_cast<int>(shape.size());
  for (int d = 0; d < a.dims; ++d) a.shape[d] = shape[d];
  for (int v = 0; v < mbk::kViews; ++v) {
    a.views[v].data = at<void>(data[v]);
    a.views[v].dtype = static_cast<mbk::DType>(dtypes[v]);
    if (data[v])
      for (int d = 0; d < a.dims; ++d) a.views[v].strides[d] = view_strides[v].at(d);
  }
  a.accumulate = accumulate, a.parameter = parameter, a.scale = scalar(scale), a.threads = threads;
  const mbk::Result r = result_of(result);
  const py::gil_scoped_release release;
  return mbk::run_pointwise_loss(mbk::current_backend(), loss, in_double ? mbk::DType::f64 : mbk::DType::f32, a, r);
}

template <class... L>
std::vector<std::string> names(mbk::MBK_ISA::LossList<L...>) {
  return {L::name...};
}

// Asks for huge pages under [address, address + bytes) before they are touched; a hint, errors are none.
void advise_huge_pages(Address address, std::size_t bytes) {
  const Address page = static_cast<Address>(sysconf(_SC_PAGESIZE));
  const Address first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
}

void elementary(const std::string& isa, const std::string& name, bool in_double, Address x, Address y,
                std::int64_t n) {
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
    for (const mbk::Elementary* f = mbk::current_backend().elementary; f->name; ++f) found.emplace_back(f->name);
    return found;
  });
  m.def("elementary", &elementary, py::arg("isa"), py::arg("name"), py::arg("in_double"), py::arg("x"), py::arg("y"),
        py::arg("n"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));

  m.def("exact_value", [](Address s) { return mbk::exact_value(*at<mbk::ExactSumState>(s)); }, py::arg("state"));
  m.def(
      "exact_result",
      [](Address s, const ResultTuple& result) {
        const mbk::DefaultEnvironment environment;
        const mbk::Result r = result_of(result);
        mbk::store_result(r, *at<mbk::ExactSumState>(s), mbk::divisor_of(r, 1));
      },
      py::arg("state"), py::arg("result"));
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

  m.def("row_loss", &row_loss);
  m.def("pointwise_loss", &pointwise_loss);
}
