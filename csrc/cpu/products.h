// Matrix products on all threads; products.cpp.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "linear.h"

namespace beit3_fast::cpu {

// Multiply-adds or elements below which a second thread costs more than it saves.
constexpr int64_t work_per_thread = 1024 * 1024;
constexpr int64_t elements_per_thread = 32 * 1024;

// Rows that stay in a second-level cache from panel to panel: 576 KiB of floats at a depth of 768. 396 rows are 4 %
// slower, all of a batch's 10 %. Rows of a weight's gradient are as deep as the batch has tokens: of those so many
// words.
constexpr int64_t rows_in_cache = 192, words_in_cache = rows_in_cache * 768;

// Computes products whose operands are of type `operands` and whose C is of type `out`. An element of C is one
// thread's, and its sum has one order: results do not depend on the number of threads.
void run_products(std::vector<Product> products, torch::headeronly::ScalarType operands,
                  torch::headeronly::ScalarType out);

}  // namespace beit3_fast::cpu
