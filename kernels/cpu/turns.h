// How position turns queries and keys (rotation.py): cosines and sines of a run of positions, and turns by them.
#ifndef KVC_TURNS_H
#define KVC_TURNS_H
#include "attention_core.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kMaxPairs = KVC_MAX_HEAD_DIM / 2;

struct Turns {
  const float* inv_freq;  // [pairs]
  int pairs, start;
  bool interleaved;
  double *cos, *sin;      // [pairs] of a turn by one step

  // `stride`: positions of a step.
  void set(const float* by, int count, int first, bool neighbours, double stride = 1) {
    inv_freq = by;
    pairs = count;
    start = first;
    interleaved = neighbours;
    for (int i = 0; i < pairs; ++i) {
      cos[i] = __builtin_cos(stride * inv_freq[i]);
      sin[i] = __builtin_sin(stride * inv_freq[i]);
    }
  }
  // c[count][pairs] and s[count][pairs] of turns by `by`, a step more and so on; `way` is 1, or -1 for a step less.
  void table(double by, int way, int count, float* c, float* s) const {
    double x[kMaxPairs], y[kMaxPairs];
    for (int i = 0; i < pairs; ++i) {
      x[i] = __builtin_cos(by * inv_freq[i]);
      y[i] = __builtin_sin(by * inv_freq[i]);
    }
    for (int t = 0; t < count; ++t, c += pairs, s += pairs)
      for (int i = 0; i < pairs; ++i) {
        const double u = x[i], v = y[i], one = way * sin[i];
        c[i] = (float)u;
        s[i] = (float)v;
        x[i] = u * cos[i] - v * one;
        y[i] = v * cos[i] + u * one;
      }
  }
  // Turns x[head_dim] on, or back.
  template <bool BACK = false>
  void turn(float* x, const float* c, const float* s) const {
    const float sign = BACK ? -1.f : 1.f;
    float* first = x + start;
    if (interleaved) {
      for (int i = 0; i < pairs; ++i) {
        const float u = first[2 * i], v = first[2 * i + 1], w = sign * s[i];
        first[2 * i] = u * c[i] - v * w;
        first[2 * i + 1] = v * c[i] + u * w;
      }
      return;
    }
    float* second = first + pairs;
    int i = 0;
    for (; i + kLanes <= pairs; i += kLanes) {
      const vf u = load(first + i), v = load(second + i), x0 = load(c + i), y0 = load(s + i) * all(sign);
      store(first + i, u * x0 - v * y0);
      store(second + i, v * x0 + u * y0);
    }
    for (; i < pairs; ++i) {
      const float u = first[i], v = second[i], w = sign * s[i];
      first[i] = u * c[i] - v * w;
      second[i] = v * c[i] + u * w;
    }
  }
};

}  // namespace
}  // namespace KVC_ISA
}  // namespace kvc
#endif
