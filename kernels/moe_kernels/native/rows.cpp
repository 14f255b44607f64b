// RMSNorm and rotary positions on CPU, a row at a time; see moe_kernels/norm.py and moe_kernels/rotary.py. Float inside,
// one rounding at the end. Every sum has one order, whatever the number of threads.

#include "tiles.h"

namespace {

constexpr int LANES = 16;

// Values as float: where they are, or in ``room``.
inline const float* floats(const float* from, i64, float*) { return from; }
inline const float* floats(const bf16* __restrict from, i64 n, float* __restrict room) {
  for (i64 c = 0; c < n; c++) room[c] = wide(from[c]);
  return room;
}

// The sum of a[c] * b[c].
inline float inner(const float* __restrict a, const float* __restrict b, i64 n) {
  float lanes[LANES] = {}, total = 0;
  i64 c = 0;
  for (; c + LANES <= n; c += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += a[c + lane] * b[c + lane];
  for (; c < n; c++) total += a[c] * b[c];
  for (float x : lanes) total += x;
  return total;
}

// What follows is done in functions: in a parallel region the compiler forgets that pointers are __restrict.

inline void scaled(const float* __restrict x, const float* __restrict scale, float r, i64 D, float* __restrict out) {
  for (i64 c = 0; c < D; c++) out[c] = x[c] * r * scale[c];
}

inline void terms(const float* __restrict x, const float* __restrict g, const float* __restrict scale, float r, i64 D,
                  float* __restrict hat, float* __restrict v, float* __restrict sum) {
  for (i64 c = 0; c < D; c++) {
    hat[c] = x[c] * r;
    v[c] = g[c] * scale[c];
    sum[c] += g[c] * hat[c];
  }
}

inline void less_mean(const float* __restrict hat, float mean, float r, i64 D, float* __restrict v) {
  for (i64 c = 0; c < D; c++) v[c] = r * (v[c] - hat[c] * mean);
}

inline void turned_pairs(const float* __restrict a, const float* __restrict b, i64 step, const float* __restrict cos,
                         const float* __restrict sin, i64 half, float* __restrict to_a, float* __restrict to_b, i64 to) {
  for (i64 i = 0; i < half; i++) {
    to_a[i * to] = a[i * step] * cos[i] - b[i * step] * sin[i];
    to_b[i * to] = b[i * step] * cos[i] + a[i * step] * sin[i];
  }
}

template <class T>
void norm_forward(const T* x, const float* scale, T* y, float* rstd, i64 N, i64 D, float eps, i64 threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch<float> room(D), out(D);
#pragma omp for schedule(static)
    for (i64 n = 0; n < N; n++) {
      const float* row = floats(x + n * D, D, room.data);
      const float r = rstd[n] = 1.0f / std::sqrt(inner(row, row, D) / float(D) + eps);
      scaled(row, scale, r, D, out.data);
      convert(out.data, D, y + n * D);
    }
  }
}

// dx, and of the weight's gradient a part for each ``stage`` rows: parts (stages, D), or null where it is not wanted.
template <class T>
void norm_backward(const T* g, const T* x, const float* scale, const float* rstd, T* dx, float* parts, i64 N, i64 D,
                   i64 stage, i64 threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch<float> room_x(D), room_g(D), hats(D), vs(D), sums(D);
    float *hat = hats.data, *v = vs.data, *sum = sums.data;
#pragma omp for schedule(static)
    for (i64 first = 0; first < N; first += stage) {
      std::fill(sum, sum + D, 0.0f);
      for (i64 n = first; n < std::min(first + stage, N); n++) {
        const float *row = floats(x + n * D, D, room_x.data), *above = floats(g + n * D, D, room_g.data);
        terms(row, above, scale, rstd[n], D, hat, v, sum);
        less_mean(hat, inner(v, hat, D) / float(D), rstd[n], D, v);
        convert(v, D, dx + n * D);
      }
      if (parts) memcpy(parts + first / stage * D, sum, D * sizeof(float));
    }
  }
}

// Token t's heads x (tokens, H, d), of which 2 half elements turn by the angles of row t % period of cos and sin. back:
// the other way round, in angle and in order of elements.
template <class T>
void turn(const T* x, const T* cos, const T* sin, T* out, i64 tokens, i64 period, i64 H, i64 d, i64 half, bool pairs,
          bool back, i64 threads) {
  const i64 step = pairs ? 2 : 1, second = pairs ? 1 : half;  // where pairs are at the side that has them as the model
  const i64 from_step = back ? 1 : step, from_second = back ? half : second;
  const i64 to_step = back ? step : 1, to_second = back ? second : half;
#pragma omp parallel num_threads(threads)
  {
    Scratch<float> room(2 * half + 2 * d);
    float *c = room.data, *s = c + half, *row = s + half, *turned = row + d;
#pragma omp for schedule(static)
    for (i64 t = 0; t < tokens; t++) {
      const i64 at = t % period * half;
      for (i64 i = 0; i < half; i++) {
        c[i] = wide(cos[at + i]);
        s[i] = back ? -wide(sin[at + i]) : wide(sin[at + i]);
      }
      for (i64 h = 0; h < H; h++) {
        const T* from = x + (t * H + h) * d;
        for (i64 i = 0; i < d; i++) row[i] = turned[i] = wide(from[i]);
        if (pairs)
          turned_pairs(row, row + from_second, from_step, c, s, half, turned, turned + to_second, to_step);
        else
          turned_pairs(row, row + half, 1, c, s, half, turned, turned + half, 1);
        convert(turned, d, out + (t * H + h) * d);
      }
    }
  }
}

}  // namespace

extern "C" {

void rows_norm_forward(i64 half, const void* x, const float* scale, void* y, float* rstd, i64 N, i64 D, double eps,
                       i64 threads) {
  if (half)
    norm_forward((const bf16*)x, scale, (bf16*)y, rstd, N, D, float(eps), threads);
  else
    norm_forward((const float*)x, scale, (float*)y, rstd, N, D, float(eps), threads);
}

void rows_norm_backward(i64 half, const void* g, const void* x, const float* scale, const float* rstd, void* dx,
                        float* parts, i64 N, i64 D, i64 stage, i64 threads) {
  if (half)
    norm_backward((const bf16*)g, (const bf16*)x, scale, rstd, (bf16*)dx, parts, N, D, stage, threads);
  else
    norm_backward((const float*)g, (const float*)x, scale, rstd, (float*)dx, parts, N, D, stage, threads);
}

void rows_turn(i64 half_precision, const void* x, const void* cos, const void* sin, void* out, i64 tokens, i64 period,
               i64 H, i64 d, i64 half, i64 pairs, i64 back, i64 threads) {
  if (half_precision)
    turn((const bf16*)x, (const bf16*)cos, (const bf16*)sin, (bf16*)out, tokens, period, H, d, half, pairs, back, threads);
  else
    turn((const float*)x, (const float*)cos, (const float*)sin, (float*)out, tokens, period, H, d, half, pairs, back,
         threads);
}
}
