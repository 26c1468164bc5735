// How the LayerNorm kernels are launched: nothing but arithmetic, so that it is tested without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define BEIT3_HOST_DEVICE __host__ __device__
#else
#define BEIT3_HOST_DEVICE
#endif

namespace beit3_fast::cuda {

// How a row is spread over threads.
enum class Span : int {
  warp,   // a row in the registers of a warp, several rows in a block
  block,  // a row in the registers of a block
  loop,   // a row of any width: a block walks it
};

// How its columns fall on vectors of 16 bytes.
enum class Fit : int {
  exact,   // vectors, and every lane holds as many as it has room for
  vector,  // vectors; some lanes hold fewer
  scalar,  // element by element: what is in memory is not aligned to vectors
};

constexpr int warp_size = 32;
constexpr int warps_of_rows = 4;       // warps in a block where each takes rows of its own
constexpr int forward_warps = 12;      // at most, in a block that shares a row: with more, a thread would
constexpr int backward_warps = 8;      // have too few registers
constexpr int max_rows = 256;          // of a block: their statistics wait in shared memory
constexpr int max_shared = 63 * 1024;  // of the 64 KiB that every GPU since 7.5 grants a block: some is static
constexpr int loop_threads = 512;
constexpr int reduce_columns = 32;  // a block of the second stage: threads along columns and
constexpr int reduce_stripes = 16;  // across partial sums

// The elements of a row that a lane has room for: a warp that has to hold fewer than it can takes rows up to 1024, and
// the widths of 768 and its multiples fill every lane. Single elements need an address each.
BEIT3_HOST_DEVICE constexpr int lane_elements(Span span, Fit fit) {
  if (fit == Fit::scalar) return 8;
  return span == Span::warp && fit == Fit::vector ? 32 : 24;
}

// A row of fp32 (an expert's weights, or partial sums) is laid out in quads, in the order in which lanes want them:
// where a lane holds vectors of 8 elements, all first halves come before all second halves, so that the 16-byte
// accesses of neighbouring lanes are neighbours. The second half begins 16 banks after the first: then the quads of
// both halves can be written in turn without bank conflicts.
BEIT3_HOST_DEVICE constexpr unsigned half_quads(unsigned width, int vector) {
  return vector == 8 ? (width / 8 + 3) / 8 * 8 + 4 : width / 4;  // 4 modulo 8, and at least width / 8
}

// The elements a row takes in that layout.
BEIT3_HOST_DEVICE constexpr int64_t plane_size(unsigned width, int vector) {
  return vector == 8 ? 8 * static_cast<int64_t>(half_quads(width, vector)) : (static_cast<int64_t>(width) + 3) / 4 * 4;
}

// Where column `column` of such a row is.
BEIT3_HOST_DEVICE constexpr unsigned place(unsigned column, unsigned width, int vector) {
  if (vector != 8) return column;
  const unsigned quad = column / 4;
  return 4 * (quad % 2 * half_quads(width, vector) + quad / 2) + column % 4;
}

struct Launch {
  Span span;
  Fit fit;
  int vector;          // elements in an access
  int threads;         // in a block
  int rows_per_block;  // consecutive rows; a block reads an expert's parameters once
  int64_t blocks;
  int shared;  // bytes of dynamic shared memory
};

// The launch for `rows` > 0 rows of `width` > 0 elements of `element_size` bytes; `aligned`: every access of 16 bytes
// of these, and of as many elements of any other operand, is aligned. `multiprocessors` of the device; one that is
// wrong costs speed alone.
inline Launch launch_rows(int width, int64_t rows, int element_size, bool aligned, int multiprocessors, bool backward) {
  Launch launch{};
  launch.vector = aligned && element_size <= 4 ? 16 / element_size : 1;
  if (width % launch.vector != 0) launch.vector = 1;
  const int64_t plane = plane_size(width, launch.vector) * static_cast<int64_t>(sizeof(float));
  const int64_t statistics = max_rows * 2 * static_cast<int64_t>(sizeof(float));
  launch.fit = launch.vector == 1                                                 ? Fit::scalar
               : width % (warp_size * lane_elements(Span::warp, Fit::exact)) == 0 ? Fit::exact
                                                                                  : Fit::vector;
  const int whole_row = warp_size * lane_elements(Span::warp, launch.fit);  // what a warp holds, alone
  const int of_warp = warp_size * lane_elements(Span::block, launch.fit);   // or as one of several
  int64_t least;     // rows of a block, so that what it reads or writes once is little beside them
  int64_t resident;  // blocks that a multiprocessor is to hold
  if (element_size <= 4 && width <= whole_row) {
    launch.span = Span::warp;
    launch.threads = warp_size * warps_of_rows;
    launch.shared = static_cast<int>((backward ? 3 : 2) * plane + statistics);
    least = backward ? 2 * warps_of_rows : warps_of_rows;
    resident = backward ? 2 : launch.fit == Fit::vector ? 3 : 4;
  } else if (element_size <= 4 && width <= (backward ? backward_warps : forward_warps) * of_warp &&
             2 * plane + statistics <= max_shared) {
    launch.span = Span::block;
    launch.threads = (width + of_warp - 1) / of_warp * warp_size;
    launch.shared = static_cast<int>((backward ? 1 : 2) * plane + statistics);
    least = backward ? 4 : 2;
    resident = std::max(1, (backward ? 256 : 512) / launch.threads);
  } else {
    launch.span = Span::loop;
    if (launch.fit == Fit::exact) launch.fit = Fit::vector;
    launch.threads = loop_threads;
    least = 1;
    resident = 2;
  }

  const int64_t one_wave = std::max(1, multiprocessors) * resident;
  const int64_t even = std::clamp<int64_t>((rows + one_wave - 1) / one_wave, least, max_rows);
  launch.rows_per_block = static_cast<int>((even + least - 1) / least * least);
  launch.blocks = (rows + launch.rows_per_block - 1) / launch.rows_per_block;
  return launch;
}

// The launch of the kernel that sums weight and bias gradients over pieces of columns, for widths of Span::loop.
struct ColumnLaunch {
  int rows_per_block;
  int64_t column_blocks;
  int64_t row_blocks;
};

inline ColumnLaunch launch_columns(int width, int64_t rows) {
  ColumnLaunch launch{};
  constexpr int64_t most = 256;  // partial sums of a column
  launch.rows_per_block = static_cast<int>(std::max<int64_t>(reduce_stripes, (rows + most - 1) / most));
  launch.row_blocks = (rows + launch.rows_per_block - 1) / launch.rows_per_block;
  launch.column_blocks = (static_cast<int64_t>(width) + reduce_columns - 1) / reduce_columns;
  return launch;
}

}  // namespace beit3_fast::cuda
