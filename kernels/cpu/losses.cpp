// What quantising loses, measured on a sample of new tokens: key_shift() decides what is taken off the keys of each
// head (paging/key_shift.py), tier_losses() says what each tier loses (plans/distortion.py). The torch forms there are
// their oracles. Errors are dotted with queries block of keys by block of keys; with bf16 keys and
// AVX-512 they are rounded to bf16 for that, a 500th of what they are.
#include "ops.h"
#include "products.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kKeys = 16 * kOnce;      // of a block
constexpr int kQueries = 32;           // key_shift: the last ones of a sequence that look
constexpr int kMost = 1024;            // key_shift: tokens of a sequence that are looked at, evenly spread
constexpr int kQuarters = 4;
constexpr int kLeastTokens = 16;       // fewer say nothing about a mean
constexpr int kTierTokens = 256, kTierKeys = 64, kTierQueries = 16;  // tier_losses: the newest tokens, samples
constexpr int kTierBlocks = (2 * kTierKeys + kKeys - 1) / kKeys;
constexpr float kTwoBitKeys = 0.85f, kTwoBitValues = 0.8f, kTwoBitSearch = 0.9375f;  // quantize.py
constexpr float kHalfMax = 65504.f;

float in_half(float x) {  // what is left of it in fp16
  uint16_t half[kLanes];
  to_f16(half, all(x));
  return from_f16(half)[0];
}
float bounded(float x, float low) { return !(x >= low) ? (x < low ? low : 0.f) : x > kHalfMax ? kHalfMax : x; }

// x[d] becomes what quantising changes in it.
void to_rounding(float* x, int d, int bits, bool values) {
  vf lows = all(__builtin_inff()), highs = all(-__builtin_inff());
  for (int i = 0; i < d; i += kLanes) {
    lows = min(lows, load(x + i));
    highs = max(highs, load(x + i));
  }
  float low = -reduce_max(-lows), high = reduce_max(highs);
  if (bits == 2) {
    const float centre = low * 0.5f + high * 0.5f;
    const float half = (high * 0.5f - low * 0.5f) * (values ? kTwoBitValues : kTwoBitKeys);
    low = centre - half;
    high = centre + half;
  }
  const float top = (float)((1 << bits) - 1);
  const float step = in_half(bounded((high - low) / top, 0.f)), offset = in_half(bounded(low, -kHalfMax));
  const bool narrow = values && bits == 2;  // looked up in a range a little narrower than what codes stand for
  const vf first = all(narrow ? offset + step * (1.5f * (1.f - kTwoBitSearch)) : offset);
  const float apart = narrow ? step * kTwoBitSearch : step;
  const vf by = all(apart > 1.1754944e-38f ? apart : 1.1754944e-38f), magic = all(12582912.f);
  for (int i = 0; i < d; i += kLanes) {
    const vf y = load(x + i);
    const vf code = min(max((y - first) / by, vf{}), all(top)) + magic - magic;  // to the nearest, half to even
    store(x + i, code * all(step) + all(offset) - y);
  }
}

// Blocks of keys, and rows of queries that meet them.
struct Blocks : Form {
  int64_t block_bytes() const { return kKeys * row_bytes(); }
  // Products of four rows with the first `used` keys of a block, `used` rounded up to 16: out[4][kKeys].
  void dot(const char* block, const char* rows, int used, float (*out)[kKeys]) const {
    const char *keys[kOnce], *row[kHeads];
    for (int h = 0; h < kHeads; ++h) row[h] = rows + h * row_bytes();
    for (int i = 0; i < kOnce; ++i) keys[i] = block + i * 16 * row_bytes();
    if (used <= 16 * (kOnce - 1)) {  // a block that is not full
      for (int i = 0; 16 * i < used; ++i) {
        if (pairs) some<true, 1>(keys + i, row, i, out);
        else some<false, 1>(keys + i, row, i, out);
      }
      return;
    }
    if (pairs) some<true, kOnce>(keys, row, 0, out);
    else some<false, kOnce>(keys, row, 0, out);
  }
  template <bool PAIRS, int N>
  void some(const char* const* keys, const char* const* row, int at, float (*out)[kKeys]) const {
    for (int part = 0; part < kParts; ++part) {
      vf sum[N][kHeads];
      products<PAIRS, N>(keys, row, head_dim, part, sum);
      KVC_UNROLL for (int b = 0; b < N; ++b)
        KVC_UNROLL for (int h = 0; h < kHeads; ++h) store(out[h] + 16 * (at + b) + part * kLanes, sum[b][h]);
    }
  }
};

thread_local Arena arena;

// ---- key_shift -------------------------------------------------------------------------------------------------
struct Seen {  // of one query by one block of keys: the largest logit, and sums of weights, and of weights times errors
  float top, weight;
  float error[2], square[2];  // of keys as they are, and without their mean
};

struct Tokens {  // of a sequence
  int count, first, picked, of_mean;  // real ones, the first of them; how many are in the lists
  int32_t pick[kMost + 1];            // those that queries look at
  int32_t mean[kMost];                // those that the mean is made of
};

struct KeyShift {
  const KvcKeyShift* a;
  Blocks plain, turned;  // logits are made of keys and queries as they are; errors of turned ones
  Tokens* tokens;        // [batch]
  float* mean;           // [rows][D], turned where errors are
  char *looks, *turned_looks;  // [rows][row of queries]
  Seen* seen;            // [rows][blocks][row of queries]
  int queries, query_rows, blocks;

  bool real(int b, int t) const { return !a->valid || a->valid[(int64_t)b * a->n + t]; }
  bool rotates() const { return a->bits <= 4; }
  void rotate(float* x) const {
    if (rotates()) hadamard(x, a->head_dim, a->head_dim & -a->head_dim);
  }
  void load_key(int row, int t, float* out) const {
    load_floats(out, a->k, row / a->kv_heads * a->k_b + row % a->kv_heads * a->k_h + t * a->k_t, a->head_dim, a->dtype);
  }

  void pick(int b) const {
    Tokens& p = tokens[b];
    p.count = p.picked = p.of_mean = p.first = 0;
    for (int t = a->n - 1; t >= 0; --t)
      if (real(b, t)) {
        ++p.count;
        p.first = t;
      }
    if (!p.count) return;
    const int stride = (a->n + kMost - 1) / kMost, step = 1 + (p.count - 1) / kMost;
    p.pick[p.picked++] = p.first;
    for (int t = 0; t < a->n; t += stride)
      if (real(b, t) && t != p.first) p.pick[p.picked++] = t;
    int rank = 0;
    for (int t = p.first; t < a->n; ++t)
      if (real(b, t) && rank++ % step == 0) p.mean[p.of_mean++] = t;
  }

  // The mean of a row as far as its quarters agree on it, rounded to the dtype of keys.
  void find_mean(int row) const {
    const Tokens& p = tokens[row / a->kv_heads];
    const int d = a->head_dim;
    alignas(64) float sum[kQuarters][KVC_MAX_HEAD_DIM], x[KVC_MAX_HEAD_DIM];
    float counts[kQuarters] = {};
    memset(sum, 0, sizeof sum);
    const int step = p.count ? 1 + (p.count - 1) / kMost : 1;
    for (int i = 0; i < p.of_mean; ++i) {
      const int part = (int)((int64_t)i * step * kQuarters / p.count);
      load_key(row, p.mean[i], x);
      counts[part] += 1.f;
      for (int c = 0; c < d; c += kLanes) store(sum[part] + c, load(sum[part] + c) + load(x + c));
    }
    float* out = a->shift + (int64_t)row * d;
    for (int c = 0; c < d; c += kLanes) {
      vf whole = vf{}, low = all(__builtin_inff()), high = all(-__builtin_inff());
      for (int part = 0; part < kQuarters; ++part) {
        const vf m = load(sum[part] + c) * all(1.f / (counts[part] > 1.f ? counts[part] : 1.f));
        whole = whole + m;
        low = min(low, m);
        high = max(high, m);
      }
      whole = whole * all(1.f / kQuarters);
      const vf spread = high - low;
      const vf steady = whole - max(min(whole, spread), -spread);
      alignas(64) uint16_t rounded[kLanes];
      to_bf16(rounded, p.count >= kLeastTokens ? steady : vf{});
      store(out + c, from_bf16(rounded));
    }
    if (a->dtype == KVC_F16)
      for (int c = 0; c < d; ++c) out[c] = in_half(out[c]);
    memcpy(mean + (int64_t)row * d, out, sizeof(float) * d);
    rotate(mean + (int64_t)row * d);
  }

  void set_queries(int row) const {
    const int b = row / a->kv_heads, h0 = row % a->kv_heads * a->group;
    alignas(64) float x[KVC_MAX_HEAD_DIM];
    for (int r = 0; r < query_rows; ++r) {
      const int64_t at = ((int64_t)row * query_rows + r) * plain.row_bytes();
      const int g = r / queries, t = a->n_q - queries + r % queries;
      memset(x, 0, sizeof x);
      if (g < a->group && real(b, a->n - a->n_q + t))
        load_floats(x, a->q, b * a->q_b + (h0 + g) * a->q_h + t * a->q_t, a->head_dim, a->dtype);
      plain.put_row(looks + at, x);
      rotate(x);
      turned.put_row(turned_looks + at, x);
    }
  }

  void look(int row, int block, char* scratch) const {
    const Tokens& p = tokens[row / a->kv_heads];
    const int from = block * kKeys, used = min_int(kKeys, p.picked - from), d = a->head_dim;
    if (used <= 0) return;
    char* keys = scratch;
    char* errors[2] = {scratch + plain.block_bytes(), scratch + 2 * plain.block_bytes()};
    const float* shift = mean + (int64_t)row * d;
    for (int i = 0; i < used; i += 4) {
      alignas(64) float x[4][KVC_MAX_HEAD_DIM], y[4][KVC_MAX_HEAD_DIM];
      for (int r = 0; r < 4; ++r) {
        if (i + r < used) load_key(row, p.pick[from + i + r], x[r]);
        else memset(x[r], 0, sizeof x[r]);
      }
      plain.put(keys, i, x);
      for (int r = 0; r < 4; ++r) {
        rotate(x[r]);
        for (int c = 0; c < d; c += kLanes) store(y[r] + c, load(x[r] + c) - load(shift + c));
        to_rounding(x[r], d, a->bits, false);
        to_rounding(y[r], d, a->bits, false);
      }
      turned.put(errors[0], i, x);
      turned.put(errors[1], i, y);
    }
    Seen* out = seen + ((int64_t)row * blocks + block) * query_rows;
    for (int r = 0; r < query_rows; r += kHeads) {
      const int64_t at = ((int64_t)row * query_rows + r) * plain.row_bytes();
      alignas(64) float s[kHeads][kKeys], e[2][kHeads][kKeys];
      plain.dot(keys, looks + at, used, s);
      for (int which = 0; which < 2; ++which) turned.dot(errors[which], turned_looks + at, used, e[which]);
      for (int h = 0; h < kHeads; ++h) add_up(s[h], e[0][h], e[1][h], used, out[r + h]);
    }
  }

  static void add_up(float* s, const float* plainly, const float* shifted, int used, Seen& out) {
    const int end = (used + kLanes - 1) / kLanes * kLanes;
    for (int i = used; i < end; ++i) s[i] = kMasked;
    vf top = all(kMasked);
    for (int i = 0; i < end; i += kLanes) top = max(top, load(s + i));
    out.top = reduce_max(top) * kLog2e;
    vf weight = vf{}, error[2] = {vf{}, vf{}}, square[2] = {vf{}, vf{}};
    for (int i = 0; i < end; i += kLanes) {
      const vf p = exp2(load(s + i) * all(kLog2e) - all(out.top));
      weight = weight + p;
      KVC_UNROLL for (int which = 0; which < 2; ++which) {
        const vf e = load((which ? shifted : plainly) + i), pe = p * e;
        error[which] = error[which] + pe;
        square[which] = pe * e + square[which];
      }
    }
    out.weight = reduce_add(weight);
    for (int which = 0; which < 2; ++which) {
      out.error[which] = reduce_add(error[which]);
      out.square[which] = reduce_add(square[which]);
    }
  }

  // Leaves a row without its shift if that does not bring its logits closer to the true ones.
  void decide(int row) const {
    const Tokens& p = tokens[row / a->kv_heads];
    const int used = (p.picked + kKeys - 1) / kKeys;
    double lost[2] = {};
    for (int r = 0; r < queries * a->group; ++r) {
      if (!real(row / a->kv_heads, a->n - queries + r % queries)) continue;
      const Seen* of = seen + (int64_t)row * blocks * query_rows + r;
      float top = kMasked;
      for (int i = 0; i < used; ++i)
        if (of[(int64_t)i * query_rows].top > top) top = of[(int64_t)i * query_rows].top;
      double weight = 0, error[2] = {}, square[2] = {};
      for (int i = 0; i < used; ++i) {
        const Seen& one = of[(int64_t)i * query_rows];
        const double factor = exp2(one.top - top);
        weight += factor * one.weight;
        for (int which = 0; which < 2; ++which) {
          error[which] += factor * one.error[which];
          square[which] += factor * one.square[which];
        }
      }
      for (int which = 0; which < 2; ++which)  // softmax does not see what all keys have in common
        lost[which] += square[which] / weight - error[which] / weight * (error[which] / weight);
    }
    const bool gains = lost[1] < (double)a->most * lost[0];
    if (!gains) memset(a->shift + (int64_t)row * a->head_dim, 0, sizeof(float) * a->head_dim);
  }
};

// ---- tier_losses -----------------------------------------------------------------------------------------------
struct TierLosses {
  const KvcTierLosses* a;
  Blocks form;

  struct Sample {  // of a sequence's newest tokens
    int first, step, keys, queries;
  };
  Sample sample(int b) const {
    const int count = a->count ? (int)a->count[b] : a->n, window = min_int(count, kTierTokens);
    const int step = window >= 2 * kTierKeys ? window / kTierKeys : 1;
    return {a->n - window, step, (window + step - 1) / step, min_int(window, kTierQueries)};
  }

  // Squared errors of values in each tier, over their squared distances from the mean one.
  void of_values(int row, const Sample& s, float* loss) const {
    const int d = a->head_dim;
    const int64_t at = row / a->kv_heads * a->v_b + row % a->kv_heads * a->v_h + s.first * a->v_t;
    alignas(64) float centre[KVC_MAX_HEAD_DIM] = {}, x[KVC_MAX_HEAD_DIM], y[KVC_MAX_HEAD_DIM];
    for (int i = 0; i < s.keys; ++i) {
      load_floats(x, a->v, at + (int64_t)i * s.step * a->v_t, d, a->dtype);
      for (int c = 0; c < d; c += kLanes) store(centre + c, load(centre + c) + load(x + c));
    }
    const vf each = all(1.f / s.keys);
    vf spread = vf{}, lost[KVC_MAX_TIERS] = {};
    for (int i = 0; i < s.keys; ++i) {
      load_floats(x, a->v, at + (int64_t)i * s.step * a->v_t, d, a->dtype);
      for (int c = 0; c < d; c += kLanes) {
        const vf off = load(x + c) - load(centre + c) * each;
        spread = off * off + spread;
      }
      for (int t = 0; t < a->tiers; ++t) {
        if (!a->value_bits[t]) continue;
        memcpy(y, x, sizeof y);
        to_rounding(y, d, a->value_bits[t], true);
        for (int c = 0; c < d; c += kLanes) lost[t] = load(y + c) * load(y + c) + lost[t];
      }
    }
    const float total = reduce_add(spread), least = 1e-12f * s.keys;
    for (int t = 0; t < a->tiers; ++t) loss[t] = reduce_add(lost[t]) / (total > least ? total : least);
  }

  // Variance of the errors of logits with keys of so many bits; softmax does not see what all keys have in common.
  float of_keys(int row, const Sample& s, int bits, char* blocks) const {
    const int d = a->head_dim, b = row / a->kv_heads, head = row % a->kv_heads, rows = s.queries * a->group;
    char* query = blocks + kTierBlocks * form.block_bytes();
    const auto rotate = [&](float* x) {
      if (bits <= 4) hadamard(x, d, d & -d);
    };
    alignas(64) float x[4][KVC_MAX_HEAD_DIM], e[kHeads][kKeys];
    for (int i = 0; i < s.keys; i += 4) {
      for (int r = 0; r < 4; ++r) {
        memset(x[r], 0, sizeof x[r]);
        if (i + r >= s.keys) continue;
        const int64_t t = s.first + (int64_t)(i + r) * s.step;
        load_floats(x[r], a->k, b * a->k_b + head * a->k_h + t * a->k_t, d, a->dtype);
        rotate(x[r]);
        to_rounding(x[r], d, bits, false);
      }
      form.put(blocks + i / kKeys * form.block_bytes(), i % kKeys, x);
    }
    float total = 0.f;
    for (int r = 0; r < rows; r += kHeads) {
      for (int h = 0; h < kHeads; ++h) {
        const int g = (r + h) / s.queries, t = a->n - s.queries + (r + h) % s.queries;
        memset(x[0], 0, sizeof x[0]);
        if (g < a->group)
          load_floats(x[0], a->q, b * a->q_b + (head * a->group + g) * a->q_h + t * a->q_t, d, a->dtype);
        rotate(x[0]);
        form.put_row(query + h * form.row_bytes(), x[0]);
      }
      float sum[kHeads] = {}, square[kHeads] = {};
      for (int from = 0; from < s.keys; from += kKeys) {
        const int used = min_int(kKeys, s.keys - from);
        form.dot(blocks + from / kKeys * form.block_bytes(), query, used, e);
        for (int h = 0; h < kHeads; ++h)
          for (int i = 0; i < used; ++i) {
            sum[h] += e[h][i];
            square[h] += e[h][i] * e[h][i];
          }
      }
      for (int h = 0; h < kHeads; ++h) total += square[h] - sum[h] / s.keys * sum[h];
    }
    return total / ((float)rows * s.keys) * a->scale * a->scale;
  }

  void of_row(int row, char* scratch) const {
    float* out = a->loss + (int64_t)row * a->tiers;
    const Sample s = sample(row / a->kv_heads);
    if (!s.keys) {
      for (int t = 0; t < a->tiers; ++t) out[t] = __builtin_nanf("");
      return;
    }
    of_values(row, s, out);
    float lost[KVC_MAX_TIERS];
    for (int t = 0; t < a->tiers; ++t) {
      lost[t] = 0.f;
      int same = 0;  // the first tier with as many bits
      while (a->key_bits[same] != a->key_bits[t]) ++same;
      if (a->key_bits[t]) lost[t] = same < t ? lost[same] : of_keys(row, s, a->key_bits[t], scratch);
      const float loss = out[t] + lost[t];
      out[t] = loss < __builtin_inff() ? loss : 1.f;  // where numbers leave their range, it is as bad as evicting
    }
  }
};

}  // namespace

int key_shift(KvcKeyShift* a) {
  KeyShift c;
  c.a = a;
  const bool pairs = KVC_WIDTH == 64 && a->dtype == KVC_BF16;
  c.plain = c.turned = {pairs, a->head_dim};
  c.queries = min_int(kQueries, a->n_q);
  c.query_rows = (c.queries * a->group + kHeads - 1) / kHeads * kHeads;
  c.blocks = (min_int(a->n, kMost) + 1 + kKeys - 1) / kKeys;
  const int64_t rows = (int64_t)a->batch * a->kv_heads, units = rows * c.blocks;
  int threads = max_threads();
  if ((double)units * c.query_rows * kKeys * a->head_dim < 1.5e6 * threads) threads = 1;
  const int64_t scratch_bytes = 3 * c.plain.block_bytes();
  char* scratch = nullptr;
  Carve carve = {nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    scratch = carve.take<char>(scratch_bytes * threads);
    c.tokens = carve.take<Tokens>(a->batch);
    c.mean = carve.take<float>(rows * a->head_dim);
    c.looks = carve.take<char>(rows * c.query_rows * c.plain.row_bytes());
    c.turned_looks = carve.take<char>(rows * c.query_rows * c.plain.row_bytes());
    c.seen = carve.take<Seen>(units * c.query_rows);
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_NO_MEMORY;
      carve = {base};
    }
  }
  for (int b = 0; b < a->batch; ++b) c.pick(b);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      c.find_mean((int)row);
      c.set_queries((int)row);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; ++i)
      c.look((int)(i % rows), (int)(i / rows), scratch + scratch_bytes * thread_index());
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) c.decide((int)row);
  }
  arena.trim();
  return KVC_OK;
}

int tier_losses(KvcTierLosses* a) {
  TierLosses c;
  c.a = a;
  c.form = {false, a->head_dim};
  const int rows = a->batch * a->kv_heads;
  const int64_t scratch_bytes = kTierBlocks * c.form.block_bytes() + kHeads * c.form.row_bytes();
  int threads = max_threads();
  if (threads > rows) threads = rows;
  if ((double)rows * a->group * a->head_dim * kTierQueries * kTierKeys < 1.5e6 * threads) threads = 1;
  char* scratch = arena.reserve(scratch_bytes * threads);
  if (!scratch) return KVC_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int row = 0; row < rows; ++row) c.of_row(row, scratch + scratch_bytes * thread_index());
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
