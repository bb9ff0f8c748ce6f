#pragma once
// Whole calls on a CUDA device, the counterparts of cpu/row_call.h and cpu/pointwise_call.h. They
// allocate nothing, wait for nothing and read nothing back: all pointers (of tensors, scalars,
// results) are the device's, and what a call needs in between lies in a workspace that the caller
// allocates. A class index outside [0, columns) makes its row NaN and is noted in the device's
// error word. Host functions; each throws std::runtime_error with CUDA's own words.
#include "core/args.h"
#include "core/result.h"

namespace mbk {
struct AccumulateArgs;  // core/tensor_list.h
struct FlushArgs;
struct ProductArgs;  // core/product_args.h
}  // namespace mbk

namespace mbk::cuda {

// Where a call runs. The device must be the current one.
struct Queue {
  void* stream;     // cudaStream_t
  void* workspace;  // workspace_bytes(), aligned to 16, with any contents. Its first 8 bytes hold
                    // the divisor of the mean (a double) when the call is done.
};

int64_t workspace_bytes(int64_t items, bool in_double);

// As run_row_loss, run_pointwise_loss and run_multirow_loss on the CPU; `args` as the caller sees
// it. The divisor of the backward half (from_state) is args.denominator, which may be a pointer.
void run_row_loss(const Queue& queue, int loss, DType input, RowArgs args, const Result& result);
void run_pointwise_loss(const Queue& queue, int loss, DType type, PointwiseArgs args,
                        const Result& result);
void run_multirow_loss(const Queue& queue, int loss, DType type, MultirowArgs args,
                       const Result& result);

// As run_accumulate and run_flush on the CPU (cpu/list_call.h). The workspace holds
// list_workspace_bytes(), with any contents; results are the device's.
int64_t list_workspace_bytes(int64_t tensors, int64_t blocks);
void run_accumulate(const Queue& queue, AccumulateArgs args, double* squares);
void run_flush(const Queue& queue, FlushArgs args, double max_norm, double* stats, double* squares);

// x = x * (factor / hint), rounded once; nothing is touched where that is 1. keep_zeros: 0 stays 0
// also where the factor is not finite.
void scale_array(const Queue& queue, void* x, DType dtype, int64_t n, const Scalar& factor,
                 const Scalar& hint, bool keep_zeros);
// to = from, rounded once, with canonical NaNs.
void convert_array(const Queue& queue, const void* from, DType from_dtype, void* to, DType to_dtype,
                   int64_t n);

// As Backend::product, with the same bits; no scratch.
bool run_product(const Queue& queue, const ProductArgs& args);

// The same for exact sums as cpu/reduction.h.
void exact_result(const Queue& queue, const ExactSumState* sum, const Result& result);
void exact_merge(const Queue& queue, ExactSumState* into, const ExactSumState* from);
void exact_add(const Queue& queue, ExactSumState* into, const float* values, int64_t n);

// An elementary function over an array of T, for the self-test; false if there is none of that
// name.
bool elementary(const Queue& queue, const char* name, bool in_double, const void* x, void* y,
                int64_t n);

// Makes a device the current one of this thread, if it is not.
void use_device(int number);

// The bad class indices that the current device has met since they were last taken: how many, and
// one of them. Waits for the device.
struct TargetErrors {
  int64_t count, item, value, columns;
};
TargetErrors take_target_errors();

}  // namespace mbk::cuda
