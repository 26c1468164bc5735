// What products.cpp and its kernels agree on; knows nothing of torch.
#pragma once

#include <cstdint>

namespace beit3_fast {

// Rows of elements, dense in themselves, in the order of `index` if there is one.
struct RowSource {
  const void* data;
  int64_t stride;  // elements from row to row
  const int64_t* index;

  template <class T>
  const T* row(int64_t r) const {
    return static_cast<const T*>(data) + (index == nullptr ? r : index[r]) * stride;
  }
};

// C = A B, then for each element: + bias, GELU, + residual. One expert's part of a linear layer or of its gradients.
struct Product {
  int64_t rows, columns, depth;
  RowSource a;  // C's rows are rows of a, or its columns if across
  RowSource b;  // C's columns are rows of b, or its columns if across
  bool a_across, b_across;
  const void* panels;  // b as packed weights are stored, in panels of widest_panel columns; null: b is read
  const void* bias;    // of each column, of the operands' type; or null
  bool gelu;
  void* pre;             // what GELU is applied to, in the operands' type; or null
  const void* residual;  // of C's type; or null
  void* out;
  int64_t out_stride;        // of pre, residual and out
  const int64_t* out_index;  // row of out, pre and residual for each row of C; or null

  // Of int8 panels, for each column: what a step is worth, and behind them all, the sums of the columns. null: no int8.
  const float* column_scales;

  int64_t left_stride;  // words from row to row of a task's `left`
  float* row_scales;    // of int8: what a step is worth in each row

  int64_t out_row(int64_t r) const { return (out_index == nullptr ? r : out_index[r]) * out_stride; }
};

// A rectangle of C that one thread computes in one go.
struct ProductTask {
  const Product* product;
  int64_t row, rows, column, columns;
  const void* left;  // its rows as the multiply-adds take them, whole tiles of them; null: a is read in place
};

// Up to this many rows, B is read where it lies: bringing it into panels would cost more than the products.
constexpr int64_t few_rows = 48;

constexpr int64_t product_tile_rows = 6, widest_panel = 64, widest_vector = 16;  // of every instruction set

inline int64_t left_stride_of(int64_t words) { return (words + widest_vector - 1) / widest_vector * widest_vector; }

inline int64_t packed_rows_of(int64_t rows) {
  return (rows + product_tile_rows - 1) / product_tile_rows * product_tile_rows;
}

// Words of the depth that a panel of b has at a time: 256 KiB, so that with the next ones on their way they stay in a
// second-level cache.
constexpr int64_t depth_block = 1024;

// Bytes of scratch that a task needs: a panel of b (of whole pairs), the rows of a at its end, sums.
inline int64_t product_scratch(int64_t rows, int64_t depth) {
  const int64_t block = depth < depth_block ? depth + depth % 2 : depth_block;
  const int64_t summed = depth > depth_block ? packed_rows_of(rows) : product_tile_rows;
  return 4 * ((block + summed) * widest_panel + product_tile_rows * left_stride_of(depth));
}

}  // namespace beit3_fast
