// Runs every probe at every instruction set of this processor and compares with plain loops in double: for sanitizers,
// and for processors that have no torch, emulated ones for instance.
//
// Every tensor ends where its heap block ends, so that an address sanitizer sees the first byte past it, and is
// misaligned in one of two runs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "probe.h"

namespace {

enum Dtype { float32, bfloat16, float16, float64 };
constexpr Dtype half_types[] = {bfloat16, float16}, all_types[] = {float32, bfloat16, float16};
constexpr const char* isa_names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int isa = 0, failures = 0;
bool misaligned = false;

double value_of(Dtype dtype, uint16_t bits) {
  if (dtype == bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

uint32_t random_bits() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

class Tensor {
 public:
  // Values that every dtype holds: multiples of 1/64 in (-2, 2). Without `filled`: NaN.
  Tensor(Dtype dtype, int64_t count, bool filled = true)
      : dtype_(dtype), count_(count), memory_(new char[misaligned + count * size()]) {
    std::memset(data(), 0xff, count * size());
    for (int64_t i = 0; filled && i < count; ++i) set(i, static_cast<int>(random_bits() % 255) - 127);
  }

  void* data() const { return memory_.get() + misaligned; }
  int64_t count() const { return count_; }

  double operator[](int64_t i) const {
    const char* const from = static_cast<const char*>(data()) + i * size();
    if (dtype_ == float64) return read<double>(from);
    return dtype_ == float32 ? read<float>(from) : value_of(dtype_, read<uint16_t>(from));
  }

  void set(int64_t i, int numerator) {
    const double value = numerator / 64.0;
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    uint16_t half = bits >> 16;
    if (dtype_ == float16) {
      int exponent;
      const double mantissa = std::frexp(std::fabs(value), &exponent);
      half = value == 0 ? 0 : static_cast<uint16_t>((exponent + 13) * 1024 + static_cast<int>(mantissa * 2048));
      if (value < 0) half |= 0x8000;
    }
    const void* const from = dtype_ == float64   ? static_cast<const void*>(&value)
                             : dtype_ == float32 ? static_cast<const void*>(&narrow)
                                                 : static_cast<const void*>(&half);
    std::memcpy(static_cast<char*>(data()) + i * size(), from, size());
  }

 private:
  int64_t size() const { return dtype_ == float64 ? 8 : dtype_ == float32 ? 4 : 2; }

  template <class T>
  static T read(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }

  Dtype dtype_;
  int64_t count_;
  std::unique_ptr<char[]> memory_;
};

double tolerance(Dtype dtype) { return dtype == float64 ? 1e-12 : dtype == float32 ? 1e-5 : 0.02; }

// `actual` is `expected` up to the tolerance of its dtype, of the largest magnitude and at least 1.
void check(const char* what, Dtype dtype, const std::function<double(int64_t)>& actual,
           const std::vector<double>& expected) {
  double largest = 1, worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(actual(i) - expected[i]);
    largest = std::fmax(largest, std::fabs(expected[i]));
    if (!(error <= worst)) worst = error;  // a NaN stays
  }
  if (worst <= tolerance(dtype) * largest) return;
  ++failures;
  std::printf("%s, %s, dtype %d%s: error %g of %g\n", what, isa_names[isa], dtype, misaligned ? ", misaligned" : "",
              worst, largest);
}

void check(const char* what, bool holds) {
  if (holds) return;
  ++failures;
  std::printf("%s, %s%s: does not hold\n", what, isa_names[isa], misaligned ? ", misaligned" : "");
}

// ---- conversions ----

void try_conversions(Dtype dtype) {
  constexpr int64_t count = 65535;  // not whole vectors
  const Tensor halves(dtype, count, false), floats(float32, count, false), back(dtype, count, false);
  const auto widen = dtype == bfloat16 ? widen_bfloat16 : widen_float16;
  const auto round = dtype == bfloat16 ? round_bfloat16 : round_float16;
  for (uint16_t bits = 0; bits < count; ++bits) {
    std::memcpy(static_cast<char*>(halves.data()) + 2 * bits, &bits, sizeof(bits));
  }
  widen(isa, halves.data(), static_cast<float*>(floats.data()), count);
  bool same = true;
  for (int64_t i = 0; i < count; ++i) {
    const double expected = value_of(dtype, static_cast<uint16_t>(i));
    same &= floats[i] == expected || (std::isnan(floats[i]) && std::isnan(expected));
  }
  check("widening", same);

  // the values halfway to the next one: to the even one of both
  const int64_t finite = dtype == bfloat16 ? 0x7f80 : 0x7c00;
  for (int64_t i = 0; i < finite; ++i) {
    const double next = i + 1 == finite ? 2 * value_of(dtype, i) - value_of(dtype, i - 1) : value_of(dtype, i + 1);
    const float middle = static_cast<float>((value_of(dtype, i) + next) / 2);
    std::memcpy(static_cast<char*>(floats.data()) + 4 * i, &middle, sizeof(middle));
  }
  round(isa, static_cast<float*>(floats.data()), back.data(), finite);
  same = true;
  for (int64_t i = 0; i < finite; ++i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<char*>(back.data()) + 2 * i, sizeof(bits));
    same &= bits == (i + 1) / 2 * 2;
  }
  check("rounding", same);
}

// ---- LayerNorm of a row, and its gradient ----

template <class A, class Forward, class Backward>
void try_layer_norm(Dtype dtype, int64_t width, Forward forward, Backward backward) {
  const Tensor x(dtype, width), residual(dtype, width), weight(dtype, width), bias(dtype, width), dy(dtype, width);
  const Tensor total(dtype, width, false), y(dtype, width, false), dtotal(dtype, width, false);
  std::vector<A> scratch(width), dweight((width + 63) / 64 * 64), dbias(dweight.size());
  A mean, rstd;
  forward(isa, x.data(), residual.data(), total.data(), scratch.data(), weight.data(), bias.data(), y.data(), width,
          A{1e-5f}, &mean, &rstd);
  double sum = 0, squares = 0;
  std::vector<double> expected(width);
  for (int64_t i = 0; i < width; ++i) sum += expected[i] = x[i] + residual[i];
  check("sum with the residual", dtype, [&](int64_t i) { return total[i]; }, expected);
  for (int64_t i = 0; i < width; ++i) squares += (total[i] - sum / width) * (total[i] - sum / width);
  const double scale = 1 / std::sqrt(squares / width + A{1e-5f});
  check("mean and rstd", dtype, [&](int64_t i) { return i ? rstd : mean; }, {sum / width, scale});
  const auto h = [&](int64_t i) { return (total[i] - mean) * rstd; };
  for (int64_t i = 0; i < width; ++i) expected[i] = h(i) * weight[i] + bias[i];
  check("LayerNorm", dtype, [&](int64_t i) { return y[i]; }, expected);

  backward(isa, dy.data(), total.data(), weight.data(), residual.data(), mean, rstd, dtotal.data(), dweight.data(),
           dbias.data(), width);
  double mean_g = 0, mean_gh = 0;
  for (int64_t i = 0; i < width; ++i) {
    mean_g += dy[i] * weight[i] / width;
    mean_gh += dy[i] * weight[i] * h(i) / width;
  }
  for (int64_t i = 0; i < width; ++i) {
    expected[i] = (dy[i] * weight[i] - mean_g - h(i) * mean_gh) * rstd + residual[i];
  }
  check("LayerNorm gradient", dtype, [&](int64_t i) { return dtotal[i]; }, expected);
  for (int64_t i = 0; i < width; ++i) expected[i] = dy[i] * h(i);
  check("LayerNorm weight gradient", dtype, [&](int64_t i) { return dweight[i]; }, expected);

  forward(isa, x.data(), nullptr, nullptr, scratch.data(), weight.data(), bias.data(), y.data(), width, A{1e-5f}, &mean,
          &rstd);
  for (int64_t i = 0; i < width; ++i) expected[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  check("LayerNorm without residual", dtype, [&](int64_t i) { return y[i]; }, expected);
}

// ---- products of linear layers ----

double gelu(double x) { return x / 2 * std::erfc(-x * std::sqrt(0.5)); }

// Also with the epilogue: bias, GELU, a residual and rows in another order.
void try_linear(Dtype dtype, int64_t rows, int64_t columns, int64_t depth, bool a_across, bool b_across,
                bool epilogue) {
  const Dtype out_dtype = epilogue ? float32 : dtype;
  const Tensor a(dtype, rows * depth), b(dtype, columns * depth), bias(dtype, columns);
  const Tensor residual(out_dtype, rows * columns), out(out_dtype, rows * columns, false);
  const Tensor pre(dtype, rows * columns, false);
  std::vector<int64_t> source(a_across ? depth : rows), target(rows);
  for (size_t i = 0; i < source.size(); ++i) source[i] = source.size() - 1 - i;
  for (int64_t i = 0; i < rows; ++i) target[i] = (i + 1) % rows;
  const bool as_stored = dtype == float32 || (dtype == bfloat16 && isa == 3 && depth % 2 == 0 && !misaligned);
  const bool intact = product(
      isa, dtype, out_dtype == float32, rows, columns, depth, a.data(), a_across ? rows : depth,
      epilogue ? source.data() : nullptr, a_across, as_stored && !epilogue && !a_across && rows > 48, b.data(),
      b_across ? columns : depth, b_across, epilogue ? bias.data() : nullptr, epilogue, epilogue ? pre.data() : nullptr,
      epilogue ? residual.data() : nullptr, out.data(), columns, epilogue ? target.data() : nullptr);
  check("a product within its memory", intact);
  std::vector<double> expected(rows * columns), sums(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; ++n) {
      double sum = epilogue ? bias[n] : 0;
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t line = a_across ? k : r, from = epilogue ? source[line] : line;
        sum += a[a_across ? from * rows + r : from * depth + k] * b[b_across ? k * columns + n : n * depth + k];
      }
      const int64_t at = (epilogue ? target[r] : r) * columns + n;
      sums[at] = sum;
      expected[at] = epilogue ? gelu(sum) + residual[at] : sum;
    }
  }
  check(
      "product", out_dtype == float32 && dtype != float32 ? float32 : dtype, [&](int64_t i) { return out[i]; },
      expected);
  if (epilogue) check("what GELU is applied to", dtype, [&](int64_t i) { return pre[i]; }, sums);
}

// Weights in panels of 64 columns, as many neighbours along the depth together as the dtype has.
void try_packed_linear(Dtype dtype, int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t panel = 64;
  const int64_t together = dtype == bfloat16 ? 2 : 1;
  const Tensor a(dtype, rows * depth), panels(dtype, columns * depth), out(float32, rows * columns, false);
  check("a product within its memory",
        packed_product(isa, dtype, rows, columns, depth, a.data(), panels.data(), nullptr, out.data(), columns));
  std::vector<double> expected(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t r = i / columns, n = i % columns;
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t word = (n / panel * (depth / together) + k / together) * panel + n % panel;
      expected[i] += a[r * depth + k] * panels[word * together + k % together];
    }
  }
  check("product with packed weights", float32, [&](int64_t i) { return out[i]; }, expected);
}

void try_int8(Dtype dtype, int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t panel = 64;
  Tensor a(dtype, rows * depth);
  const Tensor scales(float32, 2 * columns), out(float32, rows * columns, false);
  const std::unique_ptr<int8_t[]> panels(new int8_t[columns * depth]);
  for (int64_t i = 0; i < columns * depth; ++i) panels[i] = static_cast<int>(random_bits() % 255) - 127;
  for (int64_t r = 0; r < rows; ++r) a.set(r * depth, 127);  // so that a step is worth 1 / 64, and all are whole
  check("a product within its memory", packed_product(isa, dtype, rows, columns, depth, a.data(), panels.get(),
                                                      static_cast<const float*>(scales.data()), out.data(), columns));
  std::vector<double> expected(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t r = i / columns, n = i % columns;
    double sum = -128 * scales[columns + n];  // what stands for the sum of a column may be any number
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t word = (n / panel * (depth / 4) + k / 4) * panel + n % panel;
      sum += (64 * a[r * depth + k] + 128) * panels[word * 4 + k % 4];
    }
    expected[i] = sum / 64 * scales[n];
  }
  check("int8 product", float32, [&](int64_t i) { return out[i]; }, expected);
}

void try_linear_gradients(Dtype dtype, int64_t rows, int64_t columns) {
  const Tensor dy(dtype, rows * columns), pre(dtype, rows * columns);
  const Tensor out(dtype, rows * columns, false), sums(dtype, columns, false);
  gradients(isa, dtype, dy.data(), pre.data(), out.data(), rows, columns, sums.data());
  std::vector<double> expected(rows * columns), of_columns(columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double x = pre[i], density = std::exp(-x * x / 2) * 0.3989422804014327;
    expected[i] = dy[i] * (std::erfc(-x * std::sqrt(0.5)) / 2 + x * density);
    of_columns[i % columns] += dy[i];
  }
  check("gradient of GELU", dtype, [&](int64_t i) { return out[i]; }, expected);
  check("sums of columns", dtype, [&](int64_t i) { return sums[i]; }, of_columns);
}

// ---- attention ----

enum Mask { full, captioning, causal, forbidden };

void try_attention(Dtype dtype, Mask mask, int64_t head_dim) {
  constexpr int64_t heads = 2, batch = 5, longest = 34;
  const int32_t samples[batch][4] = {{0, 5, 24, 3}, {0, 0, 27, 17}, {5, 1, 0, 0}, {6, 18, 44, 16}, {0, 0, 0, 0}};
  const int64_t rows = 60, width = heads * head_dim;
  const Tensor qkv(dtype, rows * 3 * width), dout(dtype, rows * width);
  const Tensor out(dtype, rows * width, false), dqkv(dtype, rows * 3 * width, false);
  std::vector<float> lse(heads * rows);
  const std::unique_ptr<bool[]> hidden(new bool[longest * longest]);
  for (int64_t i = 0; i < longest * longest; ++i) hidden[i] = i % (longest + 1) && random_bits() % 3 == 0;
  const float scale = 0.25f;
  const auto run = [&](const void* upstream, void* gradient) {
    check("attention within its memory",
          attention(isa, dtype, samples, batch, rows, heads, head_dim, mask == forbidden ? full : mask,
                    mask == forbidden ? hidden.get() : nullptr, longest, scale, qkv.data(), out.data(), lse.data(),
                    upstream, gradient));
  };
  run(nullptr, nullptr);
  run(dout.data(), dqkv.data());

  std::vector<double> expected(rows * width), gradient(rows * 3 * width), expected_lse(heads * rows);
  for (const int32_t (&sample)[4] : samples) {
    const int64_t vision_start = sample[0], vision = sample[1], text_start = sample[2], length = vision + sample[3];
    for (int64_t head = 0; head < heads; ++head) {
      const auto row = [&](int64_t i) { return i < vision ? vision_start + i : text_start + i - vision; };
      const auto at = [&](int64_t part, int64_t i) { return ((row(i) * 3 + part) * heads + head) * head_dim; };
      const auto out_at = [&](int64_t i) { return (row(i) * heads + head) * head_dim; };
      for (int64_t i = 0; i < length; ++i) {
        std::vector<double> p(length), dp(length);
        double total = 0, delta = 0;
        for (int64_t j = 0; j < length; ++j) {
          const bool seen = mask == full || (mask == forbidden && !hidden[i * longest + j]) ||
                            (mask != forbidden && (j <= i || (mask == captioning && j < vision)));
          double score = 0;
          for (int64_t c = 0; c < head_dim; ++c) score += scale * qkv[at(0, i) + c] * qkv[at(1, j) + c];
          total += p[j] = seen ? std::exp(score) : 0;
        }
        expected_lse[head * rows + row(i)] = std::log(total);
        for (int64_t j = 0; j < length; ++j) {
          p[j] /= total;
          for (int64_t c = 0; c < head_dim; ++c) {
            expected[out_at(i) + c] += p[j] * qkv[at(2, j) + c];
            dp[j] += dout[out_at(i) + c] * qkv[at(2, j) + c];
          }
          delta += p[j] * dp[j];
        }
        for (int64_t j = 0; j < length; ++j) {
          for (int64_t c = 0; c < head_dim; ++c) {
            gradient[at(0, i) + c] += scale * p[j] * (dp[j] - delta) * qkv[at(1, j) + c];
            gradient[at(1, j) + c] += scale * p[j] * (dp[j] - delta) * qkv[at(0, i) + c];
            gradient[at(2, j) + c] += p[j] * dout[out_at(i) + c];
          }
        }
      }
    }
  }
  check("attention", dtype, [&](int64_t i) { return out[i]; }, expected);
  check("log of the sums of exponentials", float32, [&](int64_t i) { return lse[i]; }, expected_lse);
  check("attention gradient", dtype, [&](int64_t i) { return dqkv[i]; }, gradient);
}

void try_decode_attention(Dtype dtype, int64_t beams, int64_t tokens, int64_t length, int64_t head_dim) {
  constexpr int64_t heads = 2, batch = 2;
  const int32_t samples[batch][4] = {{0, 5, 6, 3}, {5, 1, 0, 0}};
  const int64_t prefix_rows = 9, width = heads * head_dim, slots = batch * beams;
  const Tensor qkv(dtype, slots * tokens * 3 * width), prefix(dtype, prefix_rows * 2 * width);
  const Tensor words(dtype, length * slots * 2 * width), out(dtype, slots * tokens * width, false);
  std::vector<int32_t> history(length * slots);
  for (int32_t& slot : history) slot = random_bits() % slots;
  check("decoding within its memory",
        decode_attention(isa, dtype, samples, batch, heads, head_dim, beams, tokens, length, qkv.data(), prefix.data(),
                         words.data(), history.data(), out.data()));
  std::vector<double> expected(out.count());
  for (int64_t query = 0; query < slots * tokens; ++query) {
    const int64_t slot = query / tokens;
    const auto& [vision_start, vision, text_start, text] = samples[slot / beams];
    for (int64_t head = 0; head < heads; ++head) {
      double total = 0;
      for (int64_t j = 0; j < vision + text + length + query % tokens + 1; ++j) {
        const int64_t word = j - vision - text, token = slot * tokens + word - length;
        const Tensor& tensor = word < 0 ? prefix : word < length ? words : qkv;
        const int64_t row = j < vision      ? vision_start + j
                            : word < 0      ? text_start + j - vision
                            : word < length ? word * slots + history[word * slots + slot]
                                            : token;
        const int64_t key = (word < length ? 2 * row : 3 * row + 1) * width + head * head_dim;
        double score = 0;
        for (int64_t c = 0; c < head_dim; ++c) score += qkv[3 * query * width + head * head_dim + c] * tensor[key + c];
        const double weight = std::exp(score / std::sqrt(head_dim));
        total += weight;
        for (int64_t c = 0; c < head_dim; ++c) {
          expected[query * width + head * head_dim + c] += weight * tensor[key + width + c];
        }
      }
      for (int64_t c = 0; c < head_dim; ++c) expected[query * width + head * head_dim + c] /= total;
    }
  }
  check("decoding attention", dtype, [&](int64_t i) { return out[i]; }, expected);
}

void everything() {
  for (const Dtype dtype : half_types) try_conversions(dtype);
  for (const int64_t width : {1, 3, 16, 31, 67, 130}) {
    try_layer_norm<float>(float32, width, layer_norm_float32, layer_norm_gradient_float32);
    try_layer_norm<double>(float64, width, layer_norm_float64, layer_norm_gradient_float64);
    try_layer_norm<float>(bfloat16, width, layer_norm_bfloat16, layer_norm_gradient_bfloat16);
    try_layer_norm<float>(float16, width, layer_norm_float16, layer_norm_gradient_float16);
  }
  constexpr int64_t shapes[][3] = {{0, 5, 7}, {1, 1, 1}, {5, 17, 33}, {7, 70, 0}, {49, 65, 18}, {53, 9, 67}};
  for (const Dtype dtype : all_types) {
    for (const bool epilogue : {false, true}) {
      for (const auto& [rows, columns, depth] : shapes) {
        try_linear(dtype, rows, columns, depth, false, false, epilogue);
        try_linear(dtype, rows, columns, depth, false, true, epilogue);
        try_linear(dtype, rows, columns, depth, true, true, epilogue);
      }
      try_linear(dtype, 3, 2, 2300, false, false, epilogue);
      try_linear(dtype, 7, 2, 2300, true, true, epilogue);
    }
    for (const int64_t depth : {4, 36, 2052}) {
      try_packed_linear(dtype, 7, 128, depth);
      try_int8(dtype, 7, 128, depth);
    }
    try_int8(dtype, 2, 64, 4100);
    for (const int64_t columns : {1, 17, 70}) try_linear_gradients(dtype, 5, columns);
    try_attention(dtype, full, 7);
    try_attention(dtype, captioning, 40);
    try_attention(dtype, causal, 1);
    try_attention(dtype, forbidden, 24);
    try_decode_attention(dtype, 1, 1, 0, 7);
    try_decode_attention(dtype, 3, 2, 4, 24);
    try_decode_attention(dtype, 25, 2, 3, 40);
  }
}

}  // namespace

// With an argument: reads one element past the end of a row.
int main(int count, char**) {
  if (count > 1) {
    const Tensor row(float32, 5), out(bfloat16, 6, false);
    round_bfloat16(0, static_cast<const float*>(row.data()), out.data(), 6);
  }
  for (; isa <= native_isa(); ++isa) {
    for (const bool offset : {false, true}) {
      misaligned = offset;
      everything();
    }
    std::printf("%s: done\n", isa_names[isa]);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
