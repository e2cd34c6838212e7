// fit_maps(): the ridge regression from keys to queries of observers/foreseen.py, whose torch form is the oracle. Each
// query head is one unit of work. Means come off before anything is squared: keys of some models have large ones.
#include "ops.h"
#include "attention_core.h"
#include "turns.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kSome = KVC_WIDTH == 64 ? 4 : 2;  // registers of channels whose products are added up at once
constexpr float kLeastVariance = 1e-12f;

struct FitMaps {
  const KvcFitMaps* a;
  Turns turns;
  float *cos[2], *sin[2];  // [firsts][pairs] of a pair's query, and of its key
  int firsts;

  int64_t scratch_floats() const { return (3 * (int64_t)firsts + 2 * a->head_dim) * a->head_dim; }

  // A vector of each pair, turned back to position 0: x[firsts][D]; and their weighted mean.
  void collect(float* x, float* mean, const void* from, int64_t at, int64_t stride, const float* weight, int which) const {
    const int d = a->head_dim;
    memset(mean, 0, sizeof(float) * d);
    for (int p = 0; p < firsts; ++p, x += d) {
      load_floats(x, from, at + (int64_t)(p * (int64_t)a->step + which) * stride, d, a->dtype);
      turns.turn<true>(x, cos[which] + p * turns.pairs, sin[which] + p * turns.pairs);
      for (int c = 0; c < d; c += kLanes) store(mean + c, all(weight[p]) * load(x + c) + load(mean + c));
    }
  }

  // Products of channels i .. i + 4 of x with N registers of y's, summed over pairs: out[4][2 * D].
  template <int N>
  void add_up(const float* x, const float* y, float* out) const {
    const int d = a->head_dim;
    vf sum[N][kHeads];
    KVC_UNROLL for (int b = 0; b < N; ++b) KVC_UNROLL for (int h = 0; h < kHeads; ++h) sum[b][h] = vf{};
    for (int p = 0; p < firsts; ++p, x += d, y += d) {
      vf of[N];
      KVC_UNROLL for (int b = 0; b < N; ++b) of[b] = load(y + b * kLanes);
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) {
        const vf by = all(x[h]);
        KVC_UNROLL for (int b = 0; b < N; ++b) sum[b][h] = of[b] * by + sum[b][h];
      }
    }
    KVC_UNROLL for (int b = 0; b < N; ++b)
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) store(out + h * 2 * d + b * kLanes, sum[b][h]);
  }
  void multiply(const float* x, const float* y, float* out) const {
    const int d = a->head_dim;
    for (int i = 0; i < d; i += kHeads) {
      int c = 0;
      for (; c + kSome * kLanes <= d; c += kSome * kLanes) add_up<kSome>(x + i, y + c, out + i * 2 * d + c);
      for (; c < d; c += kLanes) add_up<1>(x + i, y + c, out + i * 2 * d + c);
    }
  }

  // table[D][2 * D]: a positive definite matrix, and right sides, which become the solutions.
  void solve(float* table) const {
    const int d = a->head_dim, width = 2 * d;
    const auto take = [&](float* row, const float* other, float factor, int from) {
      for (int c = from; c < width; c += kLanes) store(row + c, load(row + c) - all(factor) * load(other + c));
    };
    for (int k = 0; k < d; ++k) {
      const float* pivot = table + k * width;
      const float inverse = 1.f / pivot[k];
      for (int i = k + 1; i < d; ++i) take(table + i * width, pivot, table[i * width + k] * inverse, k / kLanes * kLanes);
    }
    for (int k = d - 1; k >= 0; --k) {
      float* row = table + k * width;
      const vf inverse = all(1.f / row[k]);
      for (int c = d; c < width; c += kLanes) store(row + c, load(row + c) * inverse);
      for (int i = 0; i < k; ++i) take(table + i * width, row, table[i * width + k], d);
    }
  }

  void fit(int64_t head, float* keys) const {
    const int d = a->head_dim, row = (int)(head / a->group), b = row / a->kv_heads;
    float *queries = keys + (int64_t)firsts * d, *weighted = queries + (int64_t)firsts * d;
    float* table = weighted + (int64_t)firsts * d;
    const float* weight = a->weight + head * firsts;
    alignas(64) float mean_key[KVC_MAX_HEAD_DIM], mean_query[KVC_MAX_HEAD_DIM];
    collect(keys, mean_key, a->k, b * a->k_b + row % a->kv_heads * a->k_h, a->k_t, weight, 1);
    const int64_t q_head = head % ((int64_t)a->kv_heads * a->group);
    collect(queries, mean_query, a->q, b * a->q_b + q_head * a->q_h, a->q_t, weight, 0);
    for (int64_t p = 0, at = 0; p < firsts; ++p)
      for (int c = 0; c < d; c += kLanes, at += kLanes) {
        const vf key = load(keys + at) - load(mean_key + c);
        store(keys + at, key);
        store(weighted + at, key * all(weight[p]));
        store(queries + at, load(queries + at) - load(mean_query + c));
      }
    multiply(weighted, keys, table);
    multiply(weighted, queries, table + d);
    float variance = 0.f;
    for (int i = 0; i < d; ++i) variance += table[i * 2 * d + i] / d;
    const float ridge = a->ridge * (variance < kLeastVariance ? kLeastVariance : variance);
    for (int i = 0; i < d; ++i) table[i * 2 * d + i] += ridge;
    solve(table);
    float *mapping = a->mapping + head * d * d, *offset = a->offset + head * d;
    memcpy(offset, mean_query, sizeof(float) * d);
    for (int i = 0; i < d; ++i)
      for (int c = 0; c < d; c += kLanes) {
        const vf x = load(table + i * 2 * d + d + c);
        store(mapping + i * d + c, x);
        store(offset + c, load(offset + c) - all(mean_key[i]) * x);
      }
  }
};

thread_local Arena arena;

}  // namespace

int fit_maps(KvcFitMaps* a) {
  FitMaps c;
  c.a = a;
  c.firsts = (a->n - 2) / a->step + 1;
  const int heads = a->batch * a->kv_heads * a->group;
  int threads = max_threads();
  if (threads > heads) threads = heads;
  if ((double)c.firsts * heads * a->head_dim * a->head_dim < 1.5e6 * threads) threads = 1;
  float* scratch = nullptr;
  const int64_t each = (c.scratch_floats() + 15) & ~int64_t(15);
  Carve carve = {nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    scratch = carve.take<float>(each * threads);
    c.turns.cos = carve.take<double>(a->pairs);
    c.turns.sin = carve.take<double>(a->pairs);
    for (int which = 0; which < 2; ++which) {
      c.cos[which] = carve.take<float>((int64_t)c.firsts * a->pairs);
      c.sin[which] = carve.take<float>((int64_t)c.firsts * a->pairs);
    }
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_NO_MEMORY;
      carve = {base};
    }
  }
  c.turns.set(a->inv_freq, a->pairs, a->start, a->interleaved, a->step);
  for (int which = 0; which < 2; ++which) c.turns.table(which, 1, c.firsts, c.cos[which], c.sin[which]);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int head = 0; head < heads; ++head) c.fit(head, scratch + each * thread_index());
  arena.trim();
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
