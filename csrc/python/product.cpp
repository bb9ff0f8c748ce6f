// Products with their sums in a fixed order.
#include "core/product_args.h"
#include "cpu/dispatch.h"
#include "python/fields.h"
#include "python/functions.h"

namespace py = pybind11;

namespace mbk::python {
namespace {

Operand operand(const Tensor& t) { return {t.data, t.dtype, t.strides[0], t.strides[1]}; }

bool is_matrix(const Tensor& t, std::int64_t rows, std::int64_t columns) {
  return t.kind == Tensor::Kind::floating && t.dims == 2 && t.shape[0] == rows &&
         t.shape[1] == columns;
}

// Whether the host can: with scratch for every thread, and the instructions.
bool takes(const ProductArgs& p, const Tensor& scratch) {
  return p.threads >= 1 && scratch.kind == Tensor::Kind::index &&
         scratch.index_type == IndexType::u8 && scratch.numel() >= p.threads * kProductScratch &&
         (p.order != ProductOrder::pairs || has_bf16_pairs());
}

// fields: a (depth, rows), b (depth, columns), c (rows, columns), whether c starts from 0 and not
// from what it holds, order, threads, scratch of bytes.
py::object product(const py::tuple& fields) {
  Fields f(fields);
  const Tensor a = f.tensor(), b = f.tensor(), c = f.output();
  ProductArgs p{};
  p.from_zero = f.boolean();
  p.order = static_cast<ProductOrder>(f.integer());
  p.skip_below = f.number();
  p.threads = static_cast<int>(f.integer());
  const Tensor scratch = f.tensor();
  const cuda::Queue queue{f.address(), nullptr};
  f.finish();
  if (a.kind != Tensor::Kind::floating || a.dims != 2 || c.kind != Tensor::Kind::floating ||
      c.dims != 2)
    return py::none();
  p.depth = a.shape[0], p.rows = a.shape[1], p.columns = c.shape[1];
  const DType wanted = a.dtype == DType::f64 || b.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (!is_matrix(b, p.depth, p.columns) || !is_matrix(c, p.rows, p.columns) || c.dtype != wanted ||
      (p.columns > 1 && c.strides[1] != 1))
    return py::none();
  if (scratch.kind == Tensor::Kind::unsuited || (f.on_host() && !takes(p, scratch)))
    return py::none();
  p.a = operand(a), p.b = operand(b);
  p.c = c.data, p.c_dtype = c.dtype, p.c_stride = c.strides[0];
  p.scratch = static_cast<char*>(scratch.data);
  bool done;
  {
    const Unlocked unlocked(p.depth * p.rows * p.columns, f.on_host());
    done = f.on_host() ? current_backend().product(p) : cuda::run_product(queue, p);
  }
  return done ? py::object(py::bool_(true)) : py::object(py::none());
}

}  // namespace

void add_product(py::module_& m) {
  m.def("product", &product, py::arg("fields"));
  m.def("has_bf16_pairs", &has_bf16_pairs);
  m.def("is_amd", &is_amd);
  m.attr("PRODUCT_SCRATCH") = kProductScratch;
  m.attr("PRODUCT_BLOCK") = kProductBlock;
}

}  // namespace mbk::python
