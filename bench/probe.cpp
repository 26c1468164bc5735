// What a CPU can do at most: multiply-adds that never leave the registers, and passes over memory beyond every cache.
//
// Compiled by bench/probe.py where it is run, and no part of the package's libraries. The code for each instruction set
// is chosen by its own `target`, so that one build serves, and is tested, on all of them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

// ---- threads ----

// Runs `work(i)` in threads 0 .. count - 1, which begin together; returns the seconds from then to the end of the last.
template <class Work>
double together(int count, Work work) {
  std::atomic<int> waiting{count};
  std::vector<std::chrono::steady_clock::time_point> begin(count), end(count);
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      begin[i] = std::chrono::steady_clock::now();
      work(i);
      end[i] = std::chrono::steady_clock::now();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto first = *std::min_element(begin.begin(), begin.end()), last = *std::max_element(end.begin(), end.end());
  return std::chrono::duration<double>(last - first).count();
}

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// ---- multiply-adds in registers ----

// Chains of dependent multiply-adds: more than the latency times the instructions a cycle of any processor (6 x 2), and
// as many as leave registers for the factors.
constexpr int64_t wide_chains = 24, narrow_chains = 12;

// Where the chains start, no two alike: a compiler may compute equal ones once.
constexpr float start[wide_chains] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12,
                                      13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24};

// Sums `rounds` products in each chain and returns the operations, a multiplication and an addition each counting one.
// What the sums come to is written, for nobody would compute them otherwise; 0.5 keeps them finite.
using Loop = int64_t (*)(int64_t rounds, float* sink);

using Portable = float __attribute__((vector_size(16)));

int64_t portable_loop(int64_t rounds, float* sink) {
  Portable sums[narrow_chains], half = Portable{} + *sink;
  for (int j = 0; j < narrow_chains; ++j) sums[j] = half * start[j];
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (Portable& sum : sums) sum = sum * half + half;
  }
  for (const Portable& sum : sums) *sink += sum[0];
  return rounds * narrow_chains * 4 * 2;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) int64_t avx2_loop(int64_t rounds, float* sink) {
  __m256 sums[narrow_chains];
  for (int j = 0; j < narrow_chains; ++j) sums[j] = _mm256_set1_ps(start[j]);
  const __m256 half = _mm256_set1_ps(*sink);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, half, half);
  }
  for (const __m256& sum : sums) *sink += _mm256_cvtss_f32(sum);
  return rounds * narrow_chains * 8 * 2;
}

__attribute__((target("avx512f"))) int64_t avx512_loop(int64_t rounds, float* sink) {
  __m512 sums[wide_chains];
  for (int j = 0; j < wide_chains; ++j) sums[j] = _mm512_set1_ps(start[j]);
  const __m512 half = _mm512_set1_ps(*sink);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, half, half);
  }
  for (const __m512& sum : sums) *sink += _mm512_cvtss_f32(sum);
  return rounds * wide_chains * 16 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) int64_t avx512_bf16_loop(int64_t rounds, float* sink) {
  __m512 sums[wide_chains];
  for (int j = 0; j < wide_chains; ++j) sums[j] = _mm512_set1_ps(start[j]);
  const __m512bh half = _mm512_cvtne2ps_pbh(_mm512_set1_ps(*sink), _mm512_set1_ps(*sink));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, half, half);
  }
  for (const __m512& sum : sums) *sink += _mm512_cvtss_f32(sum);
  return rounds * wide_chains * 32 * 2;
}
#endif

struct Isa {
  bool present;
  Loop fp32, bf16;  // where there are no bf16 products, fp32's are all there is
};

std::vector<std::pair<std::string, Isa>> isas() {
  std::vector<std::pair<std::string, Isa>> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  all.push_back({"avx512_bf16", {avx512 && __builtin_cpu_supports("avx512bf16"), avx512_loop, avx512_bf16_loop}});
  all.push_back({"avx512", {avx512, avx512_loop, avx512_loop}});
  all.push_back({"avx2", {__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2_loop, avx2_loop}});
#endif
  all.push_back({"portable", {true, portable_loop, portable_loop}});
  return all;
}

std::vector<std::string> present_isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : isas()) {
    if (isa.present) names.push_back(name);
  }
  return names;
}

int checked(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  return threads;
}

// Operations a second of `threads` threads together. Each thread's rate is over its own processor time: what others
// take of a busy machine lowers no peak. Each runs for about `seconds`, in pieces; its best piece counts.
double multiply_adds(const std::string& name, bool bf16, int threads, double seconds) {
  const auto all = isas();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& entry) { return entry.first == name; });
  if (found == all.end() || !found->second.present) {
    throw std::invalid_argument("isa " + name + " is not one of this processor's");
  }
  const Loop loop = bf16 ? found->second.bf16 : found->second.fp32;
  std::vector<double> best(checked(threads), 0.0);
  std::vector<float> sinks(threads, 0.5f);
  together(threads, [&](int i) {
    const int64_t rounds = int64_t{1} << 20;  // some milliseconds: the clock errs by microseconds
    const double start = thread_seconds();
    for (double before = start, now = start; now - start < seconds; before = now) {
      float sink = 0.5f;
      const int64_t operations = loop(rounds, &sink);
      sinks[i] = sink;
      now = thread_seconds();
      best[i] = std::max(best[i], static_cast<double>(operations) / (now - before));
    }
  });
  double sum = 0;
  for (double rate : best) sum += rate;
  return sum;
}

// ---- passes over memory ----

using Array = py::array_t<float, py::array::c_style>;

// Bytes a second, read and written ones together, of the fastest of `repetitions`; the memory that a store reads
// before it writes is not counted.
template <class Pass>
double fastest(int threads, int repetitions, int64_t size, int64_t bytes, Pass pass) {
  checked(threads);
  py::gil_scoped_release others;
  double best = 0;
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    const double seconds = together(threads, [&](int i) {
      const int64_t first = size * i / threads, last = size * (i + 1) / threads;
      pass(i, first, last - first);
    });
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return best;
}

void check_sizes(const Array& a, const Array& b) {
  if (a.size() != b.size()) {
    throw std::invalid_argument("arrays must be of one size, got " + std::to_string(a.size()) + " and " +
                                std::to_string(b.size()));
  }
}

// Also where the pages come to lie: near the threads that will use them.
void fill(Array target, float value, int threads) {
  float* out = target.mutable_data();
  fastest(threads, 1, target.size(), target.nbytes(),
          [=](int, int64_t first, int64_t count) { std::fill_n(out + first, count, value); });
}

double read_rate(const Array& source, int threads, int repetitions) {
  const float* in = source.data();
  std::vector<uint32_t> sinks(checked(threads));
  return fastest(threads, repetitions, source.size(), source.nbytes(), [&](int i, int64_t first, int64_t count) {
    uint32_t sum = 0;  // integers may be summed in any order, so in vectors
    for (int64_t k = first; k < first + count; ++k) {
      uint32_t bits;
      std::memcpy(&bits, in + k, sizeof bits);
      sum ^= bits;
    }
    static_cast<volatile uint32_t&>(sinks[i]) = sum;
  });
}

double copy_rate(const Array& source, Array target, int threads, int repetitions) {
  check_sizes(source, target);
  const float* in = source.data();
  float* out = target.mutable_data();
  return fastest(threads, repetitions, source.size(), 2 * source.nbytes(), [=](int, int64_t first, int64_t count) {
    std::memcpy(out + first, in + first, count * sizeof(float));
  });
}

double triad_rate(const Array& a, const Array& b, Array target, float factor, int threads, int repetitions) {
  check_sizes(a, b);
  check_sizes(a, target);
  const float *x = a.data(), *y = b.data();
  float* out = target.mutable_data();
  return fastest(threads, repetitions, a.size(), 3 * a.nbytes(), [=](int, int64_t first, int64_t count) {
    for (int64_t k = first; k < first + count; ++k) out[k] = x[k] + factor * y[k];
  });
}

}  // namespace

PYBIND11_MODULE(beit3_fast_probe, module) {
  using py::arg;
  module.def("isas", &present_isas, "Instruction sets of this processor that there is a loop for, the best first.");
  module.def("multiply_adds", &multiply_adds, arg("isa"), arg("bf16"), arg("threads"), arg("seconds"),
             py::call_guard<py::gil_scoped_release>(), "FLOP a second of all threads together.");
  module.def("fill", &fill, arg("target").noconvert(), arg("value"), arg("threads"));
  module.def("read", &read_rate, arg("source").noconvert(), arg("threads"), arg("repetitions"), "Bytes a second.");
  module.def("copy", &copy_rate, arg("source").noconvert(), arg("target").noconvert(), arg("threads"),
             arg("repetitions"), "Bytes a second, read and written.");
  module.def("triad", &triad_rate, arg("a").noconvert(), arg("b").noconvert(), arg("target").noconvert(), arg("factor"),
             arg("threads"), arg("repetitions"), "target = a + factor * b; bytes a second, read and written.");
}
