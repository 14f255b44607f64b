// What the compiled CPU kernels share: numbers, layouts, and the product of two tiles.
//
// Tiles are multiplied by oneDNN's batch-reduce kernel (AMX, AVX-512 or AVX2, whichever the machine has), which torch
// exports; it is declared here, so that no header of torch is needed. T is the type of rows, W of weights: float, or
// bfloat16 with sums in float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16 {
  uint16_t bits;
};
}  // namespace c10
using bf16 = c10::BFloat16;
using i64 = int64_t;

namespace at::native::cpublas {  // torch 2.7 to 2.13: ATen/native/CPUBlas.h
void brgemm(i64, i64, i64, i64, i64, i64, bool, const bf16*, const bf16*, float*, bool);
void brgemm(i64, i64, i64, i64, i64, i64, bool, const float*, const float*, float*, bool);
void brgemm_release(bool);
}  // namespace at::native::cpublas

namespace {

constexpr i64 ROWS = 64;    // of a tile
constexpr i64 COLS = 64;
constexpr i64 STEP = 8;     // tiles are widened to a multiple of it: oneDNN generates code for each size
constexpr i64 DEPTH = 32;   // likewise, of the inner dimension; at least two vectors

i64 up_to(i64 n, i64 step) { return (n + step - 1) / step * step; }

float wide(float x) { return x; }
float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

template <class T>
T narrow(float x);
template <>
float narrow<float>(float x) {
  return x;
}
template <>
bf16 narrow<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

template <class T, class From>
T as(From x) {
  if constexpr (sizeof(T) == sizeof(From))
    return x;
  else
    return narrow<T>(wide(x));
}

// to = from, rounded.
template <class T, class From>
void convert(const From* __restrict from, i64 n, T* __restrict to) {
  i64 c = 0;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) < sizeof(From))
    for (; c + 16 <= n; c += 16) {
      const auto rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + c));
      memcpy(to + c, &rounded, sizeof(rounded));
    }
#endif
  for (; c < n; c++) to[c] = as<T>(from[c]);
}

// Likewise, past the cache, for what is so large that it would have left it before it is read: memory is then not read
// before it is written.
template <class T>
void stream(const float* from, i64 n, T* to) {
#ifdef __AVX512BF16__
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && n % 32 == 0) {
    for (i64 c = 0; c < n; c += 16)
      if constexpr (sizeof(T) == 4) {
        _mm512_stream_ps(to + c, _mm512_loadu_ps(from + c));
      } else {
        const auto rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + c));
        __m256i bits;
        memcpy(&bits, &rounded, sizeof(bits));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + c), bits);
      }
    return;
  }
#endif
  convert(from, n, to);
}

// Once a thread has streamed: others see it.
inline void streamed() {
#ifdef __AVX512BF16__
  _mm_sfence();
#endif
}

// n values as T: where they are, or converted into ``room``.
template <class T, class From>
const T* converted(const From* from, i64 n, T* room) {
  if constexpr (sizeof(T) == sizeof(From)) {
    return from;
  } else {
    convert(from, n, room);
    return room;
  }
}

template <class T>
struct Scratch {
  static constexpr i64 LINE = 64 / sizeof(T);
  std::unique_ptr<T[]> memory;
  T* data;
  explicit Scratch(i64 n) : memory(new T[n + LINE]) {
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  }
};

// ---- layouts ---------------------------------------------------------------------------------------------------------

// The kernel wants its right operand as (k, n), in bfloat16 with each two rows interleaved: (k / 2, n, 2).
template <class T>
constexpr i64 PAIR = sizeof(T) == 2 ? 2 : 1;

// One value of each row of a pair, or the value of a single row, as one word.
template <class T, class W>
uint32_t word(W first, W second) {
  if constexpr (PAIR<T> == 2) return as<bf16>(first).bits | uint32_t(as<bf16>(second).bits) << 16;
  uint32_t out;
  memcpy(&out, &first, 4);
  return out;
}

constexpr i64 B = 16;  // words of a vector
typedef uint32_t Vector __attribute__((vector_size(4 * B), aligned(4)));

// The transpose of B vectors: log2(B) rounds, each of which exchanges blocks of half the size.
inline void transpose(Vector (&v)[B]) {
#define ROUND(width, low, high)                             \
  for (i64 i = 0; i < B; i++)                               \
    if (!(i & width)) {                                     \
      const Vector a = v[i], b = v[i + width];              \
      v[i] = __builtin_shuffle(a, b, Vector low);           \
      v[i + width] = __builtin_shuffle(a, b, Vector high);  \
    }
#define LIST(...) {__VA_ARGS__}
  ROUND(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  ROUND(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  ROUND(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  ROUND(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef LIST
#undef ROUND
}

// out (depth, n), from w (n, k) whose rows are ld apart. Rows of out past k are zeros.
template <class T, class W>
void pack_transposed(const W* w, i64 ld, i64 k, i64 n, i64 depth, T* out) {
  constexpr i64 pair = PAIR<T>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const i64 whole_n = n / B * B, whole_k = k / pair / B * B;
  for (i64 j = 0; j < whole_n; j += B)
    for (i64 i = 0; i < whole_k; i += B) {
      Vector block[B];
      for (i64 c = 0; c < B; c++) {
        const W* at = w + (j + c) * ld + i * pair;
        T row[B * pair];
        memcpy(&block[c], converted(at, B * pair, row), sizeof(row));
      }
      transpose(block);
      for (i64 r = 0; r < B; r++) memcpy(words + (i + r) * n + j, &block[r], sizeof(Vector));
    }
  for (i64 i = 0; i < depth / pair; i++)
    for (i64 c = i < whole_k ? whole_n : 0; c < n; c++) {
      const W* at = w + c * ld + i * pair;
      words[i * n + c] = word<T>(i * pair < k ? at[0] : W{}, i * pair + pair - 1 < k ? at[pair - 1] : W{});
    }
}

// Likewise from k rows of n values, for blocks of COLS columns, each (depth, COLS), the last one narrower.
template <class T, class Row>
void pack_rows(Row row, i64 k, i64 n, i64 depth, T* out) {
  constexpr i64 pair = PAIR<T>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (i64 i = 0; i < depth / pair; i++)
    for (i64 j = 0; j < n; j += COLS) {
      const i64 columns = std::min(COLS, n - j);
      uint32_t* __restrict to = words + j * (depth / pair) + i * columns;
      if (i * pair + pair <= k) {
        T room[2][COLS];
        const T* __restrict a = converted(row(i * pair) + j, columns, room[0]);
        const T* __restrict b = converted(row(i * pair + pair - 1) + j, columns, room[1]);
        for (i64 c = 0; c < columns; c++) to[c] = word<T>(a[c], b[c]);
      } else if (i * pair < k) {
        const auto* a = row(i * pair) + j;
        for (i64 c = 0; c < columns; c++) to[c] = word<T>(a[c], {});
      } else {
        std::fill(to, to + columns, 0);
      }
    }
}

// out (n, depth): the transpose of k rows of n values and, from there on, of zeros.
template <class T, class Row>
void pack_columns(Row row, i64 k, i64 n, i64 depth, T* out) {
  constexpr i64 pair = PAIR<T>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const i64 width = depth / pair;
  for (i64 i = 0; i < width; i += B)
    for (i64 j = 0; j < n; j += B) {
      const i64 columns = std::min(B, n - j);
      Vector block[B];
      for (i64 r = 0; r < B; r++) {
        const i64 at = (i + r) * pair;
        uint32_t line[B] = {};
        if (at + pair <= k && columns == B) {
          const T *a = row(at) + j, *b = row(at + pair - 1) + j;
          for (i64 c = 0; c < B; c++) line[c] = word<T>(a[c], b[c]);
        } else if (at < k) {
          const T *a = row(at) + j, *b = at + pair <= k ? row(at + pair - 1) + j : nullptr;
          for (i64 c = 0; c < columns; c++) line[c] = word<T>(a[c], b ? b[c] : T{});
        }
        memcpy(&block[r], line, sizeof(line));
      }
      transpose(block);
      for (i64 c = 0; c < columns; c++) memcpy(words + (j + c) * width + i, &block[c], sizeof(Vector));
    }
}

template <class T>
void tile_product(i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, float* c, i64 ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, PAIR<T> == 2);
}

// e^x to about one unit in the last place, as a polynomial, so that loops over it vectorise. Overflows to inf; NaN stays.
inline float exponential(float x) {
  const float n = std::nearbyint(std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  const float out = p * scale;
  return x > 88.72283f ? INFINITY : x < -87.33654f ? 0.0f : out;
}

}  // namespace
