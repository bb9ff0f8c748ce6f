#pragma once
// A torch tensor as the kernels see it, without linking torch: through the table of C functions
// that torch has for the exchange of tensors (DLPack 1.3, data-apis.org), which costs a fraction
// of the Python attributes; through the attributes where torch has no such table.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "core/args.h"

namespace mbk::python {

// What is read of torch itself, once, at import.
//   types: torch.Tensor and torch.nn.Parameter; of other types no pointer is taken
//   dtypes: float32, bfloat16, float16, float64, int64, int32, int16, int8, uint8
//   exchange: torch.Tensor.__dlpack_c_exchange_api__, or None
// Returns whether the table is used.
bool set_torch(const pybind11::tuple& types, const pybind11::tuple& dtypes,
               const pybind11::object& exchange);

// Whose memory a tensor lies in: the host's, or that of the CUDA device of this number.
inline constexpr int kHost = -1, kNoDevice = -2;

// What this build has kernels for. The shim, for tests, runs CUDA's kernels on the CPU: there, all
// tensors of the CPU are taken for those of CUDA device 0, unless it is switched off.
#ifdef MBKERN_CUDA
inline constexpr bool kCudaBuilt = true;
#else
inline constexpr bool kCudaBuilt = false;
#endif
#ifdef MBKERN_CUDA_SHIM
inline constexpr bool kShim = true;
#else
inline constexpr bool kShim = false;
#endif

void switch_shim(bool on);
bool shim_is_on();

class Tensor {
 public:
  enum class Kind { absent, floating, index, unsuited };

  // None: absent. Unsuited is what no pointer may be taken of (a fake, functorch-wrapped, sparse,
  // negated ... tensor, or a subclass), what lies on a device without kernels in this build, and
  // other dtypes. All tensors of a call lie on one device: the first one that is read sets it
  // (from kNoDevice), and one that lies elsewhere is unsuited.
  enum class Negated {
    ask,             // costs as much as all the rest
    ask_if_strided,  // as negated views are: they are imaginary parts of conjugated tensors
    no,              // Python's check_output has asked
  };
  Tensor(PyObject* object, int& device, Negated negated = Negated::ask);
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  Kind kind = Kind::unsuited;
  void* data = nullptr;
  DType dtype = DType::f32;               // where floating
  IndexType index_type = IndexType::i64;  // where index
  int dims = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // in elements

  explicit operator bool() const { return kind != Kind::absent; }
  std::int64_t numel() const;
  bool is(DType type) const { return kind == Kind::floating && dtype == type; }
  bool same_shape(const Tensor& other) const;
  // Whether an address lies between the first and the last byte of a floating tensor's elements.
  bool spans(const void* address) const;

 private:
  bool may_be_imaginary() const;
  bool read_table(PyObject* object);
  bool read_attributes(PyObject* object);
  bool set_device(std::int32_t type, int index);
  bool set_dtype(int position);

  int device_ = kNoDevice;
  std::vector<std::int64_t> sizes_;  // shape and strides, if read from attributes
};

// Whether an object is a torch tensor, of whatever type.
bool is_tensor(PyObject* object);

// Whether torch's table is used. Reading by attributes costs more than what short ways spare.
bool reads_by_table();

// Strides of (batch, the other dimensions as one, class dimension) of a tensor that is (C), (N, C)
// or (N, C, d1, ...) with a class dimension, else (), (N) or (N, d1, ...). False if the others do
// not merge.
bool item_strides(const Tensor& tensor, bool has_classes, Strides& strides);

}  // namespace mbk::python
