// Softmax and cross-entropy of a chunk of logits on CPU, a row at a time in the cache; see moe_kernels/loss.py.

#include "tiles.h"

namespace {

// losses = log sum exp(logits) - the target's logit. With ``above`` the logits (rows, V) become the gradient of
// <above, losses>. NaN and infinities go where the formula sends them.
template <class T>
void softmax(T* logits, const i64* targets, const float* above, float* losses, i64 rows, i64 V, i64 threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch<float> line(up_to(V, B));
    float* __restrict e = line.data;
#pragma omp for schedule(static)
    for (i64 r = 0; r < rows; r++) {
      T* row = logits + r * V;
      for (i64 c = 0; c < V; c++) e[c] = wide(row[c]);
      std::fill(e + V, e + up_to(V, B), -INFINITY);
      Floats tops = Floats{} - INFINITY, totals{};
      for (i64 c = 0; c < V; c += B) tops = larger(load(e + c), tops);
      const float top = largest(tops), at_target = e[targets[r]] - top;
      for (i64 c = 0; c < V; c += B) {
        const Floats x = exponential(load(e + c) - top);
        totals += x;
        store(e + c, x);
      }
      const float total = sum(totals);
      losses[r] = std::log(total) - at_target;
      if (above == nullptr) continue;
      const float share = above[r] / total;
      for (i64 c = 0; c < V; c++) e[c] *= share;
      e[targets[r]] -= above[r];
      convert(e, V, row);
    }
  }
}

}  // namespace

extern "C" {

void loss_softmax(i64 half, void* logits, const i64* targets, const float* above, float* losses, i64 rows, i64 V,
                  i64 threads) {
  if (half)
    softmax((bf16*)logits, targets, above, losses, rows, V, threads);
  else
    softmax((float*)logits, targets, above, losses, rows, V, threads);
}
}
