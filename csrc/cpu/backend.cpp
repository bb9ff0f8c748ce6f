// This ISA's table: all that the rest of the program sees of it.
#include "core/backend.h"

#include "cpu/elementary_table.h"

#define MBK_STRING_(x) #x
#define MBK_STRING(x) MBK_STRING_(x)

namespace mbk::MBK_ISA {

RowFn row_function(int loss, DType input);
PointwiseFn pointwise_function(int loss, DType type);
MultirowFn multirow_function(int loss, DType type);
void pointwise_sum(const PointwiseArgs&);
bool run_product(const ProductArgs&);
void accumulate(const AccumulateArgs&);
void flush(const FlushArgs&);
extern const ElementaryTable elementary_table;

extern const Backend backend;
constexpr Backend backend{MBK_STRING(MBK_ISA), &row_function,         &pointwise_function,
                          &pointwise_sum,      elementary_table.rows, &multirow_function,
                          &run_product,        &accumulate,           &flush};

}  // namespace mbk::MBK_ISA
