#include "python/tensor.h"

#include <algorithm>

namespace py = pybind11;

namespace mbk::python {
namespace {

// The part of DLPack's C interface that is used here, as its specification lays it out.
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dims;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  const std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48);
constexpr std::int32_t kDeviceCpu = 1, kDeviceCuda = 2;
enum DLCode : std::uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4 };

struct ExchangeHeader {
  std::uint32_t major, minor;
  const ExchangeHeader* older;
};
struct ExchangeTable {
  ExchangeHeader header;
  void* unused[3];  // allocate, export, import
  int (*read)(void* object, DLTensor* out);
  int (*stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

struct Torch {
  PyTypeObject* types[2] = {};
  PyObject* dtypes[9] = {};
  const ExchangeTable* table = nullptr;
  PyObject* is_neg;           // the method
  PyCFunction is_neg_itself;  // what that calls; null where it is no method in C
  PyObject *data_ptr, *dtype, *is_cpu, *is_cuda, *get_device, *shape, *stride;  // interned
} torch;

bool shimmed = kShim;

constexpr int kFloatingTypes = 4;

bool append_integers(PyObject* sequence, std::vector<std::int64_t>& out) {
  const py::object fast = py::reinterpret_steal<py::object>(PySequence_Fast(sequence, "sizes"));
  if (!fast) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i)
    out.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast.ptr(), i)));
  return !PyErr_Occurred();
}

py::object steal(PyObject* object) { return py::reinterpret_steal<py::object>(object); }

// The C function of a method without arguments; a call of it takes half the time of the method's.
PyCFunction function_of(PyObject* method) {
  if (Py_TYPE(method) != &PyMethodDescr_Type) return nullptr;
  const PyMethodDef* const def = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
  return def->ml_flags == METH_NOARGS ? def->ml_meth : nullptr;
}

// A lazy negation, which is only known to torch.
bool is_negated(PyObject* tensor) {
  const py::object negated = steal(torch.is_neg_itself ? torch.is_neg_itself(tensor, nullptr)
                                                       : PyObject_CallOneArg(torch.is_neg, tensor));
  if (!negated) PyErr_Clear();
  return negated.ptr() != Py_False;
}

}  // namespace

bool set_torch(const py::tuple& types, const py::tuple& dtypes, const py::object& exchange) {
  // Never released: they live as long as torch does.
  for (int k = 0; k < 2; ++k)
    torch.types[k] = reinterpret_cast<PyTypeObject*>(py::object(types[k]).release().ptr());
  for (int k = 0; k < 9; ++k) torch.dtypes[k] = py::object(dtypes[k]).release().ptr();
  torch.is_neg = py::object(types[0].attr("is_neg")).release().ptr();
  torch.is_neg_itself = function_of(torch.is_neg);
  torch.data_ptr = PyUnicode_InternFromString("data_ptr");
  torch.dtype = PyUnicode_InternFromString("dtype");
  torch.is_cpu = PyUnicode_InternFromString("is_cpu");
  torch.is_cuda = PyUnicode_InternFromString("is_cuda");
  torch.get_device = PyUnicode_InternFromString("get_device");
  torch.shape = PyUnicode_InternFromString("shape");
  torch.stride = PyUnicode_InternFromString("stride");
  torch.table = nullptr;
  if (!exchange.is_none()) {
    auto* header = static_cast<const ExchangeHeader*>(
        PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!header) throw py::error_already_set();
    while (header && header->major > 1) header = header->older;
    if (header && header->major == 1) torch.table = reinterpret_cast<const ExchangeTable*>(header);
  }
  return torch.table != nullptr;
}

void switch_shim(bool on) { shimmed = kShim && on; }
bool shim_is_on() { return shimmed; }

Tensor::Tensor(PyObject* object, int& device, Negated negated) {
  if (object == Py_None) {
    kind = Kind::absent;
    return;
  }
  if (Py_TYPE(object) != torch.types[0] && Py_TYPE(object) != torch.types[1]) return;
  if (!(torch.table ? read_table(object) : read_attributes(object))) {
    PyErr_Clear();  // the caller explains
    kind = Kind::unsuited;
    return;
  }
  if (device == kNoDevice) device = device_;
  if (device != device_) kind = Kind::unsuited;
  // Freed storage, and zero tensors, which never had one.
  if (!data && numel()) kind = Kind::unsuited;
  if (kind != Kind::floating || negated == Negated::no) return;
  if (negated == Negated::ask_if_strided && !may_be_imaginary()) return;
  if (is_negated(object)) kind = Kind::unsuited;
}

// Every second number of its memory, at most.
bool Tensor::may_be_imaginary() const {
  for (int d = 0; d < dims; ++d)
    if (shape[d] > 1 && strides[d] % 2) return false;
  return true;
}

bool Tensor::set_dtype(int position) {
  if (position < kFloatingTypes) {
    kind = Kind::floating;
    dtype = static_cast<DType>(position);
  } else {
    kind = Kind::index;
    index_type = static_cast<IndexType>(position - kFloatingTypes);
  }
  return true;
}

bool Tensor::set_device(std::int32_t type, int index) {
  if (type == kDeviceCpu) {
    device_ = shimmed ? 0 : kHost;
  } else if (kCudaBuilt && !kShim && type == kDeviceCuda) {
    device_ = index;
  }
  return device_ != kNoDevice;
}

bool Tensor::read_table(PyObject* object) {
  DLTensor t;
  if (torch.table->read(object, &t) != 0 || t.lanes != 1) return false;
  if (!set_device(t.device_type, t.device_id)) return false;
  if (t.dims > 0 && !t.strides) return false;
  data = static_cast<char*>(t.data) + (t.data ? t.byte_offset : 0);
  dims = t.dims, shape = t.shape, strides = t.strides;
  switch (t.code << 8 | t.bits) {
    case kFloat << 8 | 32:
      return set_dtype(0);
    case kBfloat << 8 | 16:
      return set_dtype(1);
    case kFloat << 8 | 16:
      return set_dtype(2);
    case kFloat << 8 | 64:
      return set_dtype(3);
    case kInt << 8 | 64:
      return set_dtype(4);
    case kInt << 8 | 32:
      return set_dtype(5);
    case kInt << 8 | 16:
      return set_dtype(6);
    case kInt << 8 | 8:
      return set_dtype(7);
    case kUnsigned << 8 | 8:
      return set_dtype(8);
    default:
      return false;
  }
}

bool Tensor::read_attributes(PyObject* object) {
  const py::object on_cpu = steal(PyObject_GetAttr(object, torch.is_cpu));
  const py::object type = steal(PyObject_GetAttr(object, torch.dtype));
  if (!on_cpu || !type) return false;
  if (on_cpu.ptr() == Py_True) {
    if (!set_device(kDeviceCpu, 0)) return false;
  } else {
    const py::object on_cuda = steal(PyObject_GetAttr(object, torch.is_cuda));
    if (on_cuda.ptr() != Py_True) return false;
    const py::object index = steal(PyObject_CallMethodNoArgs(object, torch.get_device));
    if (!index || !set_device(kDeviceCuda, static_cast<int>(PyLong_AsLong(index.ptr()))))
      return false;
  }
  const auto* found = std::find(std::begin(torch.dtypes), std::end(torch.dtypes), type.ptr());
  if (found == std::end(torch.dtypes)) return false;
  const py::object sizes = steal(PyObject_GetAttr(object, torch.shape));
  const py::object steps = steal(PyObject_CallMethodNoArgs(object, torch.stride));
  const py::object address = steal(PyObject_CallMethodNoArgs(object, torch.data_ptr));
  if (!sizes || !steps || !address) return false;  // sparse, quantised ...: no strides, no memory
  if (!append_integers(sizes.ptr(), sizes_)) return false;
  dims = static_cast<int>(sizes_.size());
  if (!append_integers(steps.ptr(), sizes_)) return false;
  shape = sizes_.data(), strides = sizes_.data() + dims;
  data = PyLong_AsVoidPtr(address.ptr());
  return !PyErr_Occurred() && set_dtype(static_cast<int>(found - torch.dtypes));
}

std::int64_t Tensor::numel() const {
  std::int64_t n = 1;
  for (int d = 0; d < dims; ++d) n *= shape[d];
  return n;
}

bool Tensor::same_shape(const Tensor& other) const {
  return dims == other.dims && std::equal(shape, shape + dims, other.shape);
}

bool is_tensor(PyObject* object) {
  return !PyFloat_CheckExact(object) && PyObject_TypeCheck(object, torch.types[0]);
}

bool reads_by_table() { return torch.table != nullptr; }

bool Tensor::spans(const void* address) const {
  if (kind != Kind::floating || !address || !numel()) return false;
  std::int64_t last = 0;
  for (int d = 0; d < dims; ++d) last += (shape[d] - 1) * strides[d];
  constexpr std::int64_t kBytes[kDTypes] = {4, 2, 2, 8};
  const char *const first = static_cast<const char*>(data), *const at =
                                                                static_cast<const char*>(address);
  return first <= at && at < first + (last + 1) * kBytes[static_cast<int>(dtype)];
}

bool item_strides(const Tensor& tensor, bool has_classes, Strides& out) {
  const std::int64_t* const stride = tensor.strides;
  out = {0, 0, 0};
  if (has_classes && tensor.dims == 1) {
    out.column = stride[0];
    return true;
  }
  if (tensor.dims > 0) out.outer = stride[0];
  if (has_classes) out.column = stride[1];
  if (!tensor.numel()) return true;  // no stride of it is ever used
  std::int64_t expected = -1;
  for (int d = tensor.dims - 1; d >= (has_classes ? 2 : 1); --d) {
    if (tensor.shape[d] == 1) continue;
    if (expected < 0) {
      out.inner = stride[d];
    } else if (stride[d] != expected) {
      return false;
    }
    expected = stride[d] * tensor.shape[d];
  }
  return true;
}

}  // namespace mbk::python
