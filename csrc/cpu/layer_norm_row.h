// LayerNorm of one row, in two steps that meet in the row's statistics:
//
//   row_statistics   t = x (+ residual), rounded to the type it is stored in; the mean and 1/std of t
//   row_affine       y = (t - mean) * rstd * weight + bias
//
// Main memory is read and written once: a row is at most a few tens of KiB, so all but the first look at it is served
// by the L1 or L2 cache. Included through foreach_isa.h, once for each instruction set: no include guard.

// One vector of t, from columns `at` on; left in `total` and, unless that is of the type of computation, in `scratch`.
template <class X, class R, class Total, class A>
BEIT3_INLINE void row_total(Vector<A>& t, const X* x, const R* residual, Total* total, A* scratch, int64_t at) {
  load(t, x + at);
  if constexpr (!std::is_same_v<R, none>) {
    Vector<A> r;
    load(r, residual + at);
    t += r;
    store(total + at, t);
    if constexpr (!std::is_same_v<Total, A>) load(t, total + at);
  }
  if constexpr (!std::is_same_v<Total, A>) store(scratch + at, t);
}

// The same for the last `count` columns, fewer than a vector has lanes.
template <class X, class R, class Total, class A>
BEIT3_INLINE void row_total(Vector<A>& t, const X* x, const R* residual, Total* total, A* scratch, int64_t at,
                            int64_t count) {
  load_partial(t, x + at, count);
  if constexpr (!std::is_same_v<R, none>) {
    Vector<A> r;
    load_partial(r, residual + at, count);
    t += r;
    store_partial(total + at, t, count);
    if constexpr (!std::is_same_v<Total, A>) load_partial(t, total + at, count);
  }
  if constexpr (!std::is_same_v<Total, A>) store_partial(scratch + at, t, count);
}

// Returns the row of t, widened. Total is its type in memory, that which PyTorch promotes x + residual to; R is `none`
// where there is no residual, and then total is not touched. scratch has room for one row.
template <class X, class R, class Total, class A = accumulate_t<Total>>
const A* row_statistics(const void* x_row, const void* residual_row, void* total_row, A* scratch, int64_t width, A eps,
                        A* mean_out, A* rstd_out) {
  constexpr int64_t step = lanes<A>;
  constexpr int64_t chains = 4;  // independent sums: an addition takes 3 or 4 cycles, and two can start in each
  const X* x = static_cast<const X*>(x_row);
  const R* residual = static_cast<const R*>(residual_row);
  Total* total = static_cast<Total*>(total_row);
  const int64_t whole = width - width % step;
  const int64_t unrolled = width - width % (step * chains);
  const int64_t rest = width - whole;

  Vector<A> t;
  Vector<A> sum[chains] = {};
  for (int64_t i = 0; i < unrolled; i += step * chains) {
    for (int64_t c = 0; c < chains; ++c) {
      row_total(t, x, residual, total, scratch, i + c * step);
      sum[c] += t;
    }
  }
  for (int64_t i = unrolled; i < whole; i += step) {
    row_total(t, x, residual, total, scratch, i);
    sum[0] += t;
  }
  if (rest > 0) {
    row_total(t, x, residual, total, scratch, whole, rest);
    sum[1] += t;
  }
  const A mean = sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<A>(width);

  const A* values;
  if constexpr (!std::is_same_v<Total, A>) {
    values = scratch;
  } else if constexpr (std::is_same_v<R, none>) {
    values = x;
  } else {
    values = total;
  }

  // The deviations would sum to zero but for the rounding error of the mean: their sum repairs it.
  Vector<A> square[chains] = {};
  Vector<A> drift[chains] = {};
  for (int64_t i = 0; i < unrolled; i += step * chains) {
    for (int64_t c = 0; c < chains; ++c) {
      load(t, values + i + c * step);
      t -= mean;
      square[c] += t * t;
      drift[c] += t;
    }
  }
  for (int64_t i = unrolled; i < whole; i += step) {
    load(t, values + i);
    t -= mean;
    square[0] += t * t;
    drift[0] += t;
  }
  if (rest > 0) {
    A deviation[step] = {};  // none past the end
    load_partial(t, values + whole, rest);
    store_partial(deviation, t - mean, rest);
    load(t, deviation);
    square[1] += t * t;
    drift[1] += t;
  }
  const A shift = sum_lanes<A>((drift[0] + drift[1]) + (drift[2] + drift[3])) / static_cast<A>(width);
  const A second = sum_lanes<A>((square[0] + square[1]) + (square[2] + square[3])) / static_cast<A>(width);
  const A variance = second - shift * shift;
  *mean_out = mean + shift;
  // Rounding can take the variance of a constant row below zero; a NaN must stay one.
  *rstd_out = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
  return values;
}

template <class Y, class W, class A = accumulate_t<Y>>
void row_affine(const A* values, A mean, A rstd, const void* weight_row, const void* bias_row, void* y_row,
                int64_t width) {
  constexpr int64_t step = lanes<A>;
  const W* weight = static_cast<const W*>(weight_row);
  const W* bias = static_cast<const W*>(bias_row);
  Y* y = static_cast<Y*>(y_row);
  const int64_t whole = width - width % step;
  Vector<A> t, w, b;
  for (int64_t i = 0; i < whole; i += step) {
    load(t, values + i);
    load(w, weight + i);
    load(b, bias + i);
    store(y + i, (t - mean) * rstd * w + b);
  }
  if (const int64_t rest = width - whole; rest > 0) {
    load_partial(t, values + whole, rest);
    load_partial(w, weight + whole, rest);
    load_partial(b, bias + whole, rest);
    store_partial(y + whole, (t - mean) * rstd * w + b, rest);
  }
}
