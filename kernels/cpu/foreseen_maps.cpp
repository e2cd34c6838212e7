// fit_maps(): the ridge regression from keys to queries of observers/foreseen.py, whose torch form is the oracle. Keys and
// their covariance are made once per KV head, the rest is the work of each query head. Means come off before anything is
// squared: keys of some models have large ones. Pairs that maps are found from come first, those they are tried on last.
#include "ops.h"
#include "attention_core.h"
#include "turns.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kSome = KVC_WIDTH == 64 ? 4 : 2;  // registers of channels whose products are added up at once
constexpr float kLeast = 1e-12f;                // of a sum of squares

struct FitMaps {
  const KvcFitMaps* a;
  Turns turns;
  float *cos[2], *sin[2];        // [firsts][pairs] of a pair's query, and of its key
  float *keys, *means, *spread;  // of rows: [firsts][D], [D], [D][D]
  int firsts, fitted;            // pairs; those that maps are found from

  bool tried(int p) const { return p % a->apart == a->apart - 1; }

  // A vector of each pair, turned back to position 0, less the mean of those that are fitted: x[firsts][D].
  void collect(float* x, float* mean, const void* from, int64_t at, int64_t stride, int which) const {
    const int d = a->head_dim;
    memset(mean, 0, sizeof(float) * d);
    for (int p = 0; p < firsts; ++p) {
      const int before = p / a->apart;  // that are tried
      float* to = x + (int64_t)(tried(p) ? fitted + before : p - before) * d;
      load_floats(to, from, at + (int64_t)(p * (int64_t)a->step + which) * stride, d, a->dtype);
      turns.turn<true>(to, cos[which] + p * turns.pairs, sin[which] + p * turns.pairs);
      if (tried(p)) continue;
      for (int c = 0; c < d; c += kLanes) store(mean + c, load(to + c) + load(mean + c));
    }
    for (int c = 0; c < d; ++c) mean[c] /= fitted;
    for (int p = 0; p < firsts; ++p, x += d)
      for (int c = 0; c < d; c += kLanes) store(x + c, load(x + c) - load(mean + c));
  }

  // Products of channels i .. i + 4 of x with N registers of y's, summed over pairs: out[4][width].
  template <int N>
  void add_up(const float* x, const float* y, float* out, int width) const {
    const int d = a->head_dim;
    vf sum[N][kHeads];
    KVC_UNROLL for (int b = 0; b < N; ++b) KVC_UNROLL for (int h = 0; h < kHeads; ++h) sum[b][h] = vf{};
    for (int p = 0; p < fitted; ++p, x += d, y += d) {
      vf of[N];
      KVC_UNROLL for (int b = 0; b < N; ++b) of[b] = load(y + b * kLanes);
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) {
        const vf by = all(x[h]);
        KVC_UNROLL for (int b = 0; b < N; ++b) sum[b][h] = of[b] * by + sum[b][h];
      }
    }
    KVC_UNROLL for (int b = 0; b < N; ++b)
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) store(out + h * width + b * kLanes, sum[b][h]);
  }
  void multiply(const float* x, const float* y, float* out, int width) const {
    const int d = a->head_dim;
    for (int i = 0; i < d; i += kHeads) {
      int c = 0;
      for (; c + kSome * kLanes <= d; c += kSome * kLanes) add_up<kSome>(x + i, y + c, out + i * width + c, width);
      for (; c < d; c += kLanes) add_up<1>(x + i, y + c, out + i * width + c, width);
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

  // Keys of a KV head, and their sums of products, with what keeps these from being singular.
  void prepare(int row) const {
    const int d = a->head_dim;
    float* sums = spread + (int64_t)row * d * d;
    float* own = keys + (int64_t)row * firsts * d;
    collect(own, means + row * d, a->k, row / a->kv_heads * a->k_b + row % a->kv_heads * a->k_h, a->k_t, 1);
    multiply(own, own, sums, d);
    float variance = 0.f;
    for (int i = 0; i < d; ++i) variance += sums[i * d + i] / d;
    for (int i = 0; i < d; ++i) sums[i * d + i] += a->ridge * (variance < kLeast ? kLeast : variance);
  }

  // The share of the variance of queries that a map was not found from that it foretells.
  float explained(const float* mapping, const float* x, const float* y) const {
    const int d = a->head_dim;
    vf missed = vf{}, whole = vf{};
    for (int p = fitted; p < firsts; p += kHeads) {
      const int used = min_int(kHeads, firsts - p);
      const float *keys_of[kHeads], *queries_of[kHeads];
      for (int h = 0; h < kHeads; ++h) {
        keys_of[h] = x + (int64_t)(p + (h < used ? h : 0)) * d;
        queries_of[h] = y + (int64_t)(p + (h < used ? h : 0)) * d;
      }
      for (int c = 0; c < d; c += kLanes) {
        vf left[kHeads];
        KVC_UNROLL for (int h = 0; h < kHeads; ++h) left[h] = load(queries_of[h] + c);
        for (int i = 0; i < d; ++i) {
          const vf by = load(mapping + i * d + c);
          KVC_UNROLL for (int h = 0; h < kHeads; ++h) left[h] = left[h] - all(keys_of[h][i]) * by;
        }
        for (int h = 0; h < used; ++h) {
          const vf wanted = load(queries_of[h] + c);
          missed = left[h] * left[h] + missed;
          whole = wanted * wanted + whole;
        }
      }
    }
    return 1.f - (reduce_add(missed) + kLeast) / (reduce_add(whole) + kLeast);
  }

  // A query head's map; its scratch: queries[firsts][D] and table[D][2 * D].
  void fit(int64_t head, float* queries, float* table) const {
    const int d = a->head_dim, row = (int)(head / a->group), b = row / a->kv_heads;
    const float *own = keys + (int64_t)row * firsts * d, *mean_key = means + row * d;
    alignas(64) float mean_query[KVC_MAX_HEAD_DIM];
    const int64_t q_head = head % ((int64_t)a->kv_heads * a->group);
    collect(queries, mean_query, a->q, b * a->q_b + q_head * a->q_h, a->q_t, 0);
    for (int i = 0; i < d; ++i) memcpy(table + i * 2 * d, spread + ((int64_t)row * d + i) * d, sizeof(float) * d);
    multiply(own, queries, table + d, 2 * d);
    solve(table);
    float *mapping = a->mapping + head * d * d, *offset = a->offset + head * d;
    for (int i = 0; i < d; ++i) memcpy(mapping + i * d, table + i * 2 * d + d, sizeof(float) * d);
    a->explained[head] = explained(mapping, own, queries);
    memcpy(offset, mean_query, sizeof(float) * d);
    for (int i = 0; i < d; ++i)
      for (int c = 0; c < d; c += kLanes) {
        const vf x = load(mapping + i * d + c) * all(a->gain);
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
  c.fitted = c.firsts - c.firsts / a->apart;
  const int rows = a->batch * a->kv_heads, heads = rows * a->group, d = a->head_dim;
  int threads = max_threads();
  if (threads > heads) threads = heads;
  if ((double)c.firsts * heads * d * d < 1.5e6 * threads) threads = 1;
  float *queries = nullptr, *tables = nullptr;
  Carve carve = {nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    c.keys = carve.take<float>((int64_t)rows * c.firsts * d);
    c.means = carve.take<float>((int64_t)rows * d);
    c.spread = carve.take<float>((int64_t)rows * d * d);
    queries = carve.take<float>((int64_t)threads * c.firsts * d);
    tables = carve.take<float>((int64_t)threads * 2 * d * d);
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
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = thread_index();
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) c.prepare(row);
#pragma omp for schedule(static)
    for (int head = 0; head < heads; ++head) c.fit(head, queries + thread * c.firsts * d, tables + thread * 2 * d * d);
  }
  arena.trim();
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
