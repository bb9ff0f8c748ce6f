#pragma once
// What the module offers, by room. Each of these adds its functions to the module.
#include <pybind11/pybind11.h>

namespace mbk::python {

void add_row_loss(pybind11::module_& m);        // over tensors, on every device
void add_pointwise_loss(pybind11::module_& m);  // over tensors, on every device
void add_plain_loss(pybind11::module_& m);      // the shortest way of an element-wise loss
void add_multirow_loss(pybind11::module_& m);   // over tensors, on every device
void add_product(pybind11::module_& m);         // over tensors, on the host
void add_tensor_lists(pybind11::module_& m);    // over lists of tensors, on every device
void add_arrays(pybind11::module_& m);          // over addresses, on the host
void add_cuda(pybind11::module_& m);            // over tensors, on CUDA

}  // namespace mbk::python
