// non_causal(): the probabilities that a chunk's tokens would give each other if they came again, squared and summed
// over the queries (Backend.non_causal_scores). Queries go in blocks of kBlock; every query of a block meets the same
// few keys: those near the block, and far ones that stand for all others, which are put side by side once per call.
// Logits of four query rows exist at a time. Keys belong to two blocks; even blocks add up first, then the odd ones, so
// that no two threads add to one key, and sums do not depend on how many threads there are.
#include "ops.h"
#include "products.h"
#include "turns.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kBlock = 32;             // queries that are worked on with the same keys,
constexpr int kHalf = kBlock / 2;      // and those of them that look at the same near ones
constexpr int kMargin = 16;            // a query counts for keys up to this distance from where it stands
constexpr int kNear = kBlock + 2 * kMargin;
constexpr int kNearHalf = kHalf + 2 * kMargin;
constexpr int kSinks = 4;              // the first keys are taken as they are,
constexpr int kSample = 96;            // and these stand for all others
constexpr int kFar = 16 + kSample;     // lanes: the sinks have a vector of their own
constexpr int kHere = kHalf + kMargin;
constexpr int kColumns = kNearHalf + kFar + kHere;  // logits of a row: near, sinks, sample, near from where it stands
constexpr int kSampleAt = kNearHalf + 16, kHereAt = kNearHalf + kFar;
constexpr int kAhead = 4;              // queries between the one that is fetched and the one that is worked on
static_assert(kMargin == 16 && kHalf == 16, "near keys come in vectors of 16");

struct Place {       // of a sequence's tokens, counted from the first that is not padding
  int first, count;
  int32_t far[kFar];  // of the far keys; kNowhere where there is none
};

struct Worker {
  int batch, block;  // whose turns are in cos and sin
  alignas(64) float cos[kBlock * kMaxPairs];  // [kBlock][pairs]: side by side, as rows far apart fall on the same lines
  alignas(64) float sin[kBlock * kMaxPairs];
  alignas(64) char near[kNear * KVC_MAX_HEAD_DIM * 4];
  alignas(64) float ahead[kHeads][KVC_MAX_HEAD_DIM];  // query rows seen from behind the chunk,
  alignas(64) float here[kHeads][KVC_MAX_HEAD_DIM];   // and from where they stand
  alignas(64) float s[kHeads][kColumns];
  alignas(64) float bias[kHeads][kColumns];           // 0, or kMasked
  const float* bias_of[kHeads];
  float others[kHeads];                               // keys that each of the sample stands for
  alignas(64) float sums[1][kNear];                   // [group][kNear]
};

// Base-2 logits of kHeads rows and N times 16 keys, with soft cap and bias, into columns `at` on; and the largest so far.
// Rows and keys are floats, or pairs of bf16.
template <bool PAIRS, int N>
KVC_INLINE void dots(const char* const* keys, const char* const* rows, int d, const Logits& logits, Worker& w, int at,
                     vf* top) {
  for (int part = 0; part < kParts; ++part) {
    vf sum[N][kHeads];
    products<PAIRS, N>(keys, rows, d, part, sum);
    KVC_UNROLL for (int b = 0; b < N; ++b) KVC_UNROLL for (int h = 0; h < kHeads; ++h) {
      const int column = at + 16 * b + kLanes * part;
      vf x = sum[b][h] * all(logits.scale);
      if (__builtin_expect(logits.cap_out != 0.f, 0)) x = capped(x, logits);
      x = x + load(w.bias_of[h] + column);
      store(w.s[h] + column, x);
      top[h] = max(top[h], x);
    }
  }
}

struct NonCausal {
  const KvcNonCausal* a;
  Logits logits;
  bool pairs;
  Place* places;            // [batch]
  char* far;                // [batch * kv_heads][kFar / 16] vectors of keys
  Turns turns;

  int64_t vectors_bytes(int keys) const { return (int64_t)keys * a->head_dim * (pairs ? 2 : 4); }
  int64_t elt() const { return element_bytes(a->dtype); }
  bool usable(int b, int64_t t) const {
    return t >= 0 && t < a->n && (!a->valid || a->valid[(int64_t)b * a->n + t]);
  }

  void find_places(int b) const {
    Place& p = places[b];
    p.first = 0;
    p.count = a->n;
    if (a->valid) {
      const uint8_t* valid = a->valid + (int64_t)b * a->n;
      p.count = 0;
      for (int t = a->n - 1; t >= 0; --t)
        if (valid[t]) {
          p.first = t;
          ++p.count;
        }
    }
    const int64_t spread = p.count > kSinks + 1 ? p.count - kSinks : 1;
    for (int i = 0; i < kFar; ++i) {
      const int64_t s = i - 16, place = i < 16 ? i : kSinks + (2 * s + 1) * spread / (2 * kSample);
      p.far[i] = (i < kSinks || i >= 16) && place < p.count ? (int32_t)place : kNowhere;
    }
  }

  // Four keys, or zeros where there is none, into neighbouring lanes of a vector of 16.
  void put(char* vectors, int i, int b, int kv_head, const int64_t* tokens) const {
    alignas(64) float floats[4][KVC_MAX_HEAD_DIM];
    const char* from[4];
    for (int r = 0; r < 4; ++r) {
      const int64_t at = b * a->k_b + kv_head * a->k_h + tokens[r] * a->k_t;
      const bool there = usable(b, tokens[r]);
      from[r] = reinterpret_cast<const char*>(floats[r]);
      if (!there) memset(floats[r], 0, sizeof floats[r]);
      else if (pairs) from[r] = static_cast<const char*>(a->k) + 2 * at;
      else load_floats(floats[r], a->k, at, a->head_dim, a->dtype);
    }
    put_four(vectors + i / 16 * vectors_bytes(16) + i % 16 * 4, from, pairs ? a->head_dim / 2 : a->head_dim);
  }
  void put_near(int b, int kv_head, int64_t start, char* near) const {
    for (int i = 0; i < kNear; i += 4) {
      const int64_t tokens[4] = {start + i, start + i + 1, start + i + 2, start + i + 3};
      put(near, i, b, kv_head, tokens);
    }
  }
  void put_far(int row) const {
    const Place& place = places[row / a->kv_heads];
    for (int i = 0; i < kFar; i += 4) {
      int64_t tokens[4];
      for (int r = 0; r < 4; ++r)
        tokens[r] = place.far[i + r] == kNowhere ? -1 : (int64_t)place.first + place.far[i + r];
      put(far + row * vectors_bytes(kFar), i, row / a->kv_heads, row % a->kv_heads, tokens);
    }
  }

  // How far the queries of a block are turned: from where each stands to behind the chunk.
  void set_turns(int b, int block, Worker& w) const {
    if (w.batch == b && w.block == block) return;
    w.batch = b;
    w.block = block;
    turns.table((double)places[b].count - (block * kBlock - places[b].first), -1, kBlock, w.cos, w.sin);
  }
  // Brings a key or query into the cache ahead of its turn; where there is none, nothing happens.
  void fetch(const void* p, int64_t at) const {
    for (int i = 0; i < a->head_dim * elt(); i += 64) prefetch(static_cast<const char*>(p) + at * elt() + i);
  }
  // The keys of a block, and the queries that no other one is ahead of.
  void fetch_block(int row, int block) const {
    const int64_t b = row / a->kv_heads, h = row % a->kv_heads, first = (int64_t)block * kBlock;
    for (int64_t t = first - kMargin, end = t + kNear; t < end; ++t)
      if (t >= 0 && t < a->n) fetch(a->k, b * a->k_b + h * a->k_h + t * a->k_t);
    for (int64_t t = first; t < first + kAhead && t < a->n; ++t)
      for (int g = 0; g < a->group; ++g) fetch(a->q, b * a->q_b + (h * a->group + g) * a->q_h + t * a->q_t);
  }
  // Query row h of the tile: as it stands, and turned and rounded to the model's dtype.
  void set_query(Worker& w, int h, int b, int q_head, int64_t t, int in_block) const {
    const int d = a->head_dim;
    if (!usable(b, t)) {
      memset(w.here[h], 0, sizeof w.here[h]);
      memset(w.ahead[h], 0, sizeof w.ahead[h]);
      return;
    }
    const int64_t at = b * a->q_b + q_head * a->q_h + t * a->q_t;
    fetch(a->q, at + (t + kAhead < a->n ? kAhead * a->q_t : 0));
    alignas(64) float x[KVC_MAX_HEAD_DIM];
    load_floats(x, a->q, at, d, a->dtype);
    if (pairs) memcpy(w.here[h], static_cast<const char*>(a->q) + 2 * at, 2 * d);
    else memcpy(w.here[h], x, sizeof(float) * d);
    turns.turn(x, w.cos + in_block * a->pairs, w.sin + in_block * a->pairs);
    if (pairs) return put_pairs(reinterpret_cast<char*>(w.ahead[h]), x, d);
    if (a->dtype == KVC_F32) return store_floats(w.ahead[h], 0, x, d, a->dtype);
    alignas(64) char rounded[2 * KVC_MAX_HEAD_DIM];
    store_floats(rounded, 0, x, d, a->dtype);
    load_floats(w.ahead[h], rounded, 0, d, a->dtype);
  }

  // What the query at place p, the r-th of its half block, may see, and how many keys each of the sample stands for.
  // `hidden`: 0 or kMasked, for each near key of the half block.
  void set_bias(Worker& w, int h, const Place& place, int p, int r, const float* hidden) const {
    float* bias = w.bias[h];
    w.bias_of[h] = bias;
    vi lane;
    for (int e = 0; e < kLanes; ++e) lane[e] = e;
    vf count[kHeads] = {};  // of near keys, sinks and the sample that are seen
    for (int i = 0; i < kNearHalf; i += kLanes) {
      const vi behind = all(r + kMargin - i) - lane;  // how far the key is behind the query
      const vf x = load(hidden + i);
      const vf seen = (behind <= kMargin) & (behind >= -kMargin) ? x : all(kMasked);
      count[0] = count[0] + (seen == all(0.f) ? all(1.f) : vf{});
      store(bias + i, seen);
      if (i < kHere) store(bias + kHereAt + i, behind >= 0 ? seen : all(kMasked));
    }
    for (int i = 0; i < kFar; i += kLanes) {
      const vi at = load_int(place.far + i);
      const vi seen = (at != kNowhere) & ((at > p + kMargin) | (at < p - kMargin));
      const vf one = seen ? all(1.f) : vf{};
      if (i < 16) count[1] = count[1] + one;
      else count[2] = count[2] + one;
      store(bias + kNearHalf + i, seen ? vf{} : all(kMasked));
    }
    float counted[kHeads];
    reduce_add4(count, counted);
    const float drawn = counted[2], others = place.count - counted[0] - counted[1];
    w.others[h] = (others > 1.f ? others : 1.f) / (drawn > 1.f ? drawn : 1.f);
  }

  // Turns logits into probabilities and adds their squares; `inside`: rows that are queries.
  void add_rows(Worker& w, const vf* top, int q_head0, int first, const bool* inside, int half) const {
    float m[kHeads], total[kHeads];
    reduce_max4(top, m);
    vf sum[kHeads], sample[kHeads];
    KVC_UNROLL for (int h = 0; h < kHeads; ++h) sum[h] = sample[h] = vf{};
    for (int i = 0; i < kSampleAt; i += kLanes)
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) {
        const vf p = exp2(load(w.s[h] + i) - all(m[h]));
        sum[h] = sum[h] + p;
        store(w.s[h] + i, p);
      }
    for (int i = kSampleAt; i < kHereAt; i += kLanes)
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) sample[h] = sample[h] + exp2(load(w.s[h] + i) - all(m[h]));
    for (int i = kHereAt; i < kColumns; i += kLanes)
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) sum[h] = sum[h] + exp2(load(w.s[h] + i) - all(m[h]));
    KVC_UNROLL for (int h = 0; h < kHeads; ++h) sum[h] = sample[h] * all(w.others[h]) + sum[h];
    reduce_add4(sum, total);
    for (int h = 0; h < kHeads; ++h) {
      if (!inside[h]) continue;
      const int g = (first + h) % a->group;
      if (a->sinks) total[h] += exp2(a->sinks[q_head0 + g] * kLog2e - m[h]);
      const vf inverse = all(total[h] == 0.f ? 0.f : 1.f / total[h]);  // NaN goes through
      float* out = w.sums[g] + half * kHalf;
      for (int i = 0; i < kNearHalf; i += kLanes) {
        const vf p = load(w.s[h] + i) * inverse;
        store(out + i, p * p + load(out + i));
      }
    }
  }

  template <bool PAIRS>
  void do_half(int b, int kv_head, int block, int half, Worker& w) const {
    const Place& place = places[b];
    const int t0 = block * kBlock + half * kHalf, rows = kHalf * a->group, q_head0 = kv_head * a->group;
    alignas(64) float hidden[kNearHalf];
    for (int i = 0; i < kNearHalf; ++i) hidden[i] = usable(b, (int64_t)t0 - kMargin + i) ? 0.f : kMasked;
    const char* keys[(kNearHalf + kFar) / 16];
    for (int i = 0; i < kNearHalf / 16; ++i) keys[i] = w.near + (half + i) * vectors_bytes(16);
    for (int i = 0; i < kFar / 16; ++i)
      keys[kNearHalf / 16 + i] = far + (b * a->kv_heads + kv_head) * vectors_bytes(kFar) + i * vectors_bytes(16);
    for (int first = 0; first < rows; first += kHeads) {
      const char *ahead[kHeads], *here[kHeads];
      bool inside[kHeads], any = false;
      for (int h = 0; h < kHeads; ++h) {
        const int r = (first + h) / a->group, p = t0 + r - place.first;
        inside[h] = p >= 0 && p < place.count && t0 + r < a->n;
        any |= inside[h];
        set_query(w, h, b, q_head0 + (first + h) % a->group, t0 + r, half * kHalf + r);
        if (h && (first + h) % a->group) {  // the same query, another head
          w.bias_of[h] = w.bias_of[h - 1];
          w.others[h] = w.others[h - 1];
        } else set_bias(w, h, place, p, r, hidden);
        ahead[h] = reinterpret_cast<const char*>(w.ahead[h]);
        here[h] = reinterpret_cast<const char*>(w.here[h]);
      }
      if (!any) continue;
      vf top[kHeads];
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) top[h] = all(kFloor);
      for (int i = 0; i < (kNearHalf + kFar) / 16; i += kOnce)
        dots<PAIRS, kOnce>(keys + i, ahead, a->head_dim, logits, w, 16 * i, top);
      dots<PAIRS, kHere / 16>(keys, here, a->head_dim, logits, w, kHereAt, top);
      add_rows(w, top, q_head0, first, inside, half);
    }
  }

  // `next_row`, `next_block`: what this thread does then.
  void block(int row, int block, int next_row, int next_block, Worker& w) const {
    const int b = row / a->kv_heads, kv_head = row % a->kv_heads;
    const int64_t start = (int64_t)block * kBlock - kMargin;
    set_turns(b, block, w);
    put_near(b, kv_head, start, w.near);
    memset(w.sums, 0, a->group * sizeof w.sums[0]);
    fetch_block(next_row, next_block);
    for (int half = 0; half < kBlock / kHalf; ++half) {
      if (pairs) do_half<true>(b, kv_head, block, half, w);
      else do_half<false>(b, kv_head, block, half, w);
    }
    for (int g = 0; g < a->group; ++g) {
      float* out = a->scores + ((int64_t)row * a->group + g) * a->n;
      for (int i = 0; i < kNear; ++i)
        if (usable(b, start + i)) out[start + i] += w.sums[g][i];
    }
  }
};

thread_local Arena arena;

}  // namespace

int non_causal(KvcNonCausal* a) {
  NonCausal c;
  c.a = a;
  c.logits = logits_of(a->scale, a->softcap);
  c.pairs = KVC_WIDTH == 64 && a->dtype == KVC_BF16;
  const int rows = a->batch * a->kv_heads, blocks = (a->n + kBlock - 1) / kBlock;
  int threads = max_threads();
  if ((double)a->n * rows * a->group * kColumns * a->head_dim < 1.5e6 * threads) threads = 1;

  char* workers = nullptr;
  const int64_t worker_bytes = (sizeof(Worker) + (a->group - 1) * sizeof(Worker::sums) + 63) & ~int64_t(63);
  Carve carve = {nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    workers = carve.take<char>(worker_bytes * threads);
    c.turns.cos = carve.take<double>(a->pairs);
    c.turns.sin = carve.take<double>(a->pairs);
    c.places = carve.take<Place>(a->batch);
    c.far = carve.take<char>(c.vectors_bytes(kFar) * rows);
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_BAD_ARGUMENT;
      carve = {base};
    }
  }
  c.turns.set(a->inv_freq, a->pairs, a->start, a->interleaved);
  for (int b = 0; b < a->batch; ++b) c.find_places(b);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker& w = *reinterpret_cast<Worker*>(workers + worker_bytes * thread_index());
    w.batch = w.block = -1;
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) c.put_far(row);
    for (int odd = 0; odd < 2; ++odd) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < (int64_t)(blocks + 1 - odd) / 2 * rows; ++i) {
        const int64_t next = i + 1;
        c.block((int)(i % rows), 2 * (int)(i / rows) + odd, (int)(next % rows), 2 * (int)(next / rows) + odd, w);
      }
    }
  }
  arena.trim();
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
