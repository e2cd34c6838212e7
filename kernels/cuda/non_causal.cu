// non_causal_scores on tensor cores, for head_dim 64, 128 or 256 in fp16 or bf16: the probabilities that a chunk's
// tokens would give each other if they came again, squared and summed over the queries (Backend.non_causal_scores).
//
// A thread block takes some sixteens of tokens of a KV head. In shared memory it has the keys near them and the far ones,
// sinks and sample (with 256 dimensions a third of the sample at a time), for all query heads. A warp takes sixteen
// queries of a head, which stay in its registers as operands: products with keys where the queries stand, then they are
// turned, then products with the sample, with sinks and with near keys. Of logits only a running softmax is kept, and
// those of near keys, which come last, so that their probabilities are there at once.
//
// A key near three sixteens of queries gets three sums, each into a plane of its own: nothing is added up in an order
// that varies.
//
// Compiled once for each head_dim, KVC_HEAD_DIM.
#include "tile.cuh"

namespace {

constexpr int kThreads = 128;              // of a thread block at most
constexpr int kTokens = 16;                // queries of a warp: the rows of an operand
constexpr int kMargin = 16;                // a query counts for keys up to this distance from where it stands
constexpr int kNear = kTokens + 2 * kMargin;
constexpr int kSinks = 4, kSample = 96;    // the first keys are taken as they are; these stand for all others
constexpr int kPlanes = 3;                 // sixteens of queries that a key is near
constexpr int kOnce = 4;                   // eights of keys that are multiplied at the same time

template <int kDim>
struct Shared {
  static constexpr int kSixteens = 256 / kDim;                  // of tokens, of a thread block
  static constexpr int kPieces = kDim > 128 ? 3 : 1;            // of the sample
  static constexpr int kNearRows = kTokens * (kSixteens + 2), kPiece = kSample / kPieces;
  uint4 near[kNearRows * kDim / 8], sinks[8 * kDim / 8], sample[kPiece * kDim / 8];
  uint4 turn[kDim / 4];  // of two pairs of channels: half a turn more than the block's first query is turned by, and a
                         // step, in 2^-32 of a turn
  int32_t place[kSample];
};

// Keys lie in rows of chunks of 16 bytes. Every other row has its chunks shuffled, so that two rows of four lanes do not
// meet in a bank.
template <int kDim>
KVC_DEVICE int chunk_at(int row, int c) { return row * (kDim / 8) + (c ^ (row & 1) << 2); }

// Where the tokens of a sequence are, and what stands for those far away. Places count from its first token.
struct Sequence {
  int first, count;
  KVC_DEVICE_METHOD bool has(int token) const { return token >= first && token < first + count; }
  KVC_DEVICE_METHOD int spread() const { return most(count - kSinks, 1); }
  KVC_DEVICE_METHOD int sampled(int i) const { return kSinks + (2 * i + 1) * spread() / (2 * kSample); }
  // How many of the sample are at a place or before it.
  KVC_DEVICE_METHOD int sampled_until(int place) const {
    if (place < kSinks) return 0;
    return least(((2 * kSample * (place - kSinks + 1) - 1) / spread() + 1) / 2, kSample);
  }
  // The logarithm of how many keys each of the sample stands for, for the query at a place.
  KVC_DEVICE_METHOD float each(int place) const {
    if (count <= kSinks) return kLowest;
    const int near = least(place, kMargin) + least(count - 1 - place, kMargin) + 1;
    const int sinks = least(most(place - kMargin, 0), kSinks);
    const int sample = kSample - sampled_until(place + kMargin) + sampled_until(place - kMargin - 1);
    return fast_log2(static_cast<float>(most(count - near - sinks, 1)) / static_cast<float>(most(sample, 1)));
  }
};

// Puts keys into rows of a tile, by the whole thread block: row i has the key of token at(i), or zeros where there is none.
template <int kDim, int kRows, class At>
KVC_DEVICE void bring(uint4* tile, const uint16_t* keys, int64_t stride, const Sequence& sequence, const At& at) {
  for (int i = threadIdx.x; i < kRows * kDim / 8; i += blockDim.x) {
    const int row = i / (kDim / 8), c = i % (kDim / 8), token = at(row);
    uint4* to = tile + chunk_at<kDim>(row, c);
    if (sequence.has(token)) copy_async(to, keys + token * stride + 8 * c);
    else *to = uint4{0, 0, 0, 0};
  }
}

// Sixteen queries as operands: lane (g, t) has the 8 dimensions from 32 s + 8 t on of the rows g and g + 8, pair w of row
// g + 8 r in word r + 2 (w % 2) of operand 2 s + w / 2.
template <int kDim>
using Queries = uint32_t[kDim / 16][4];

// Dot products with kTiles eights of keys, the j-th of which begins at tile(j). Lanes have dimensions of queries and of
// keys in the same order.
template <int kDim, bool kBfloat, int kTiles, class Tile>
KVC_DEVICE void products(float (&c)[kTiles][4], const Queries<kDim>& q, const Tile& tile) {
  const int even = chunk_at<kDim>(thread_lane() >> 2, thread_lane() & 3), odd = even ^ 4;
  KVC_UNROLL
  for (int j = 0; j < kTiles; j++) {
    KVC_UNROLL
    for (int i = 0; i < 4; i++) c[j][i] = 0.f;
  }
  KVC_UNROLL
  for (int s = 0; s < kDim / 32; s++) {
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) {
      const uint4 k = tile(j)[(s % 2 ? odd : even) + s / 2 * 8];
      multiply<kBfloat>(c[j], q[2 * s], k.x, k.y);
      multiply<kBfloat>(c[j], q[2 * s + 1], k.z, k.w);
    }
  }
}

template <bool kBfloat>
KVC_DEVICE uint32_t pack_pair(float a, float b) { return kBfloat ? pack_bfloats(a, b) : pack_halves(a, b); }

// Turns two pairs of channels of a row of the block; of each pair one channel is in `first`, the other in `second`.
template <bool kBfloat>
KVC_DEVICE void turn_pairs(uint32_t& first, uint32_t& second, const uint4& by, uint32_t row) {
  const float2 u = unpack_pair<kBfloat>(first), v = unpack_pair<kBfloat>(second);
  // By way of a number between one and two.
  const auto angle = [&](uint32_t begin, uint32_t step) {
    return bits_float(0x3f800000u | (begin - row * step) >> 9) * 6.283185307179586f - 9.42477796076938f;
  };
  const float a = angle(by.x, by.y), b = angle(by.z, by.w);
  const float cos_a = fast_cosine(a), sin_a = fast_sine(a), cos_b = fast_cosine(b), sin_b = fast_sine(b);
  first = pack_pair<kBfloat>(u.x * cos_a - v.x * sin_a, u.y * cos_b - v.y * sin_b);
  second = pack_pair<kBfloat>(v.x * cos_a + u.x * sin_a, v.y * cos_b + u.y * sin_b);
}

// Turns the channels i and i + kDim / 2 of queries; `row`: of the block, the lane's first.
template <int kDim, bool kBfloat>
KVC_DEVICE void turn(Queries<kDim>& q, const uint4* turns, int row) {
  KVC_UNROLL
  for (int s = 0; s < kDim / 64; s++) {
    KVC_UNROLL
    for (int w = 0; w < 4; w++) {
      const uint4 by = turns[16 * s + (thread_lane() & 3) * 4 + w];
      KVC_UNROLL
      for (int r = 0; r < 2; r++) {
        const int word = r + 2 * (w % 2), at = 2 * s + w / 2;
        turn_pairs<kBfloat>(q[at][word], q[at + kDim / 32][word], by, row + 8 * r);
      }
    }
  }
}

// A lane's part of the softmax of the rows g and g + 8: of the columns that it has. Logits are x * factor + more.
struct Softmax {
  float factor;
  float top[2] = {kLowest, kLowest}, sum[2] = {0.f, 0.f};

  KVC_DEVICE_METHOD void raise(int r, float now) {
    sum[r] *= fast_exp2(top[r] - now);
    top[r] = now;
  }
  template <int kTiles>
  KVC_DEVICE_METHOD void find_top(const float (&x)[kTiles][4], int r, float more) {
    float now = x[0][2 * r];
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) now = larger(now, larger(x[j][2 * r], x[j][2 * r + 1]));
    raise(r, larger(top[r], now * factor + more));
  }
  template <int kTiles>
  KVC_DEVICE_METHOD void add(const float (&x)[kTiles][4], float more, float more_below) {
    KVC_UNROLL
    for (int r = 0; r < 2; r++) {
      find_top(x, r, r ? more_below : more);
      const float less = (r ? more_below : more) - top[r];
      KVC_UNROLL
      for (int j = 0; j < kTiles; j++) {
        sum[r] += fast_exp2(x[j][2 * r] * factor + less) + fast_exp2(x[j][2 * r + 1] * factor + less);
      }
    }
  }
};

// Whether `lane` is less than a number, of a lane's that are between -7 and 6.
KVC_DEVICE bool lane_below(int lane, int number) { return number > 6 || (number > -7 && lane < number); }

// What a warp does with sixteen queries of a head.
template <int kDim, bool kBfloat>
struct Item {
  const KvcNonCausal& a;
  const Sequence& sequence;
  Shared<kDim>& shared;
  int token, row;      // the first query, and its row in the block
  int hidden, until;   // of the sample, those that some query is near
  float each[2];

  KVC_DEVICE_METHOD int lane_row() const { return thread_lane() >> 2; }
  KVC_DEVICE_METHOD int column(int j, int i) const { return 8 * j + 2 * (thread_lane() & 3) + i; }

  // The queries at from + token * stride, zeros where there is none.
  KVC_DEVICE_METHOD void load(Queries<kDim>& q, const uint16_t* from, int64_t stride) const {
    KVC_UNROLL
    for (int r = 0; r < 2; r++) {
      const int at = token + lane_row() + 8 * r;
      const int there = least(most(at, sequence.first), sequence.first + sequence.count - 1);
      const uint4* row = reinterpret_cast<const uint4*>(from + there * stride) + (thread_lane() & 3);
      KVC_UNROLL
      for (int s = 0; s < kDim / 32; s++) {
        // Chosen after loading: a word that is loaded with three others stays beside them, and an operand is made anew
        // for every product.
        const uint4 x = row[4 * s];
        const bool real = at == there;
        q[2 * s][r] = real ? x.x : 0, q[2 * s][r + 2] = real ? x.y : 0;
        q[2 * s + 1][r] = real ? x.z : 0, q[2 * s + 1][r + 2] = real ? x.w : 0;
      }
    }
  }
  // What logits are made of: dot products, or where there is a soft cap, logits.
  template <int kTiles>
  KVC_DEVICE_METHOD void cap(float (&x)[kTiles][4]) const {
    if (a.softcap <= 0.f) return;
    const float factor = dot_factor(a.scale, a.softcap);
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) {
      KVC_UNROLL
      for (int i = 0; i < 4; i++) x[j][i] = capped(x[j][i] * factor, a.softcap);
    }
  }
  // Hides near keys that are too far away, or further ahead than kAhead; the first kTiles eights count.
  template <int kTiles, int kAhead, int kAll>
  KVC_DEVICE_METHOD void hide_near(float (&x)[kAll][4]) const {
    const int lane = column(0, 0) - lane_row();
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) {
      KVC_UNROLL
      for (int i = 0; i < 4; i++) {
        const int ahead = 8 * j + i % 2 - i / 2 * 8 - kMargin;  // of the key, seen by the query, less `lane`
        if (lane_below(lane, -kMargin - ahead) || !lane_below(lane, kAhead - ahead + 1)) x[j][i] = kLowest;
      }
    }
    if (sequence.has(token - kMargin) && sequence.has(token - kMargin + 8 * kTiles - 1)) return;
    const int first = renewed(token - kMargin);  // few sixteens need this: nothing of it is kept from head to head
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) {
      KVC_UNROLL
      for (int i = 0; i < 4; i++) x[j][i] = sequence.has(first + column(j, i % 2)) ? x[j][i] : kLowest;
    }
  }
  KVC_DEVICE_METHOD const uint4* near(int j) const { return shared.near + (row + 8 * j) * (kDim / 8); }

  // Keys at and before each query, seen from where it stands.
  KVC_DEVICE_METHOD void see_here(Softmax& softmax, const Queries<kDim>& q) const {
    float x[(kTokens + kMargin) / 8][4];
    products<kDim, kBfloat>(x, q, [&](int j) { return near(j); });
    cap(x);
    hide_near<(kTokens + kMargin) / 8, 0>(x);
    softmax.add(x, 0.f, 0.f);
  }
  // Those of the sample that are in shared memory, from the `from`-th on.
  KVC_DEVICE_METHOD void see_sample(Softmax& softmax, const Queries<kDim>& q, int from) const {
    KVC_UNROLL_BY(1)
    for (int first = 0; first < Shared<kDim>::kPiece; first += 8 * kOnce) {
      float x[kOnce][4];
      products<kDim, kBfloat>(x, q, [&](int j) { return shared.sample + (first + 8 * j) * (kDim / 8); });
      cap(x);
      const int at = from + first;
      if (at < until && at + 8 * kOnce > hidden) {
        const int from_first = renewed(token - sequence.first);
        KVC_UNROLL
        for (int j = 0; j < kOnce; j++) {
          KVC_UNROLL
          for (int i = 0; i < 4; i++) {
            const int place = from_first + lane_row() + i / 2 * 8;
            const int behind = place - shared.place[at + column(j, i % 2)];
            if (behind <= kMargin && behind >= -kMargin) x[j][i] = kLowest;
          }
        }
      }
      softmax.add(x, each[0], each[1]);
    }
  }
  // Sinks and near keys; the sums of the latter's squared probabilities go to `to`.
  KVC_DEVICE_METHOD void see_near(Softmax& softmax, const Queries<kDim>& q, int64_t head, float* to) const {
    constexpr int tiles = kNear / 8;
    float x[tiles + 1][4];
    products<kDim, kBfloat>(x, q, [&](int j) { return j < tiles ? near(j) : shared.sinks; });
    cap(x);
    hide_near<tiles, kMargin>(x);
    KVC_UNROLL
    for (int i = 0; i < 4; i++) {
      const int sink = column(0, i % 2), place = token - sequence.first + lane_row() + i / 2 * 8;
      if (sink >= kSinks || place - sink <= kMargin) x[tiles][i] = kLowest;
    }
    KVC_UNROLL
    for (int r = 0; r < 2; r++) {
      softmax.find_top(x, r, 0.f);
      float top = softmax.top[r];
      KVC_UNROLL
      for (int bit = 1; bit < 4; bit *= 2) top = larger(top, __shfl_xor_sync(kAllLanes, top, bit));
      softmax.raise(r, top);
      float sum = softmax.sum[r];
      KVC_UNROLL
      for (int j = 0; j <= tiles; j++) {
        KVC_UNROLL
        for (int i = 2 * r; i < 2 * r + 2; i++) sum += x[j][i] = fast_exp2(x[j][i] * softmax.factor - top);
      }
      KVC_UNROLL
      for (int bit = 1; bit < 4; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
      if (a.sinks) sum += fast_exp2(a.sinks[head] * kLog2E - top);
      const float inverse = sequence.has(token + lane_row() + 8 * r) ? fast_reciprocal(sum) : 0.f;
      KVC_UNROLL
      for (int j = 0; j < tiles; j++) x[j][2 * r] *= inverse, x[j][2 * r + 1] *= inverse;
    }
    add_rows(x, to);
  }
  // Sums of squares over the queries. Lanes of a column first share its numbers out among each other, so that each adds
  // up three of twelve.
  template <int kAll>
  KVC_DEVICE_METHOD void add_rows(const float (&p)[kAll][4], float* to) const {
    constexpr int n = kNear / 4;
    float sum[n];
    KVC_UNROLL
    for (int i = 0; i < n; i++) {
      const float x = p[i / 2][i % 2], y = p[i / 2][i % 2 + 2];
      sum[i] = x * x + y * y;
    }
    int mine = 0;
    KVC_UNROLL
    for (int part = n / 2, bit = 16; bit >= 8; part /= 2, bit /= 2) {
      const bool upper = thread_lane() & bit;
      if (upper) mine += part;
      KVC_UNROLL
      for (int i = 0; i < part; i++) {
        const float other = __shfl_xor_sync(kAllLanes, upper ? sum[i] : sum[i + part], bit);
        sum[i] = (upper ? sum[i + part] : sum[i]) + other;
      }
    }
    KVC_UNROLL
    for (int i = 0; i < n / 4; i++) {
      const float all = sum[i] + __shfl_xor_sync(kAllLanes, sum[i], 4);
      const int key = token - kMargin + column((mine + i) / 2, (mine + i) % 2);
      if (!(thread_lane() & 4) && sequence.has(key)) to[key] = all;
    }
  }
};

// Grid: batch x kv_heads x sixteens of tokens by kSixteens. `places`: the first token of each sequence and how many there
// are, or null. `turned`: queries as they are behind the chunk, [batch, q_heads, n, kDim]; null: they are turned here, by
// `turns`, channel i with channel i + kDim / 2; a.inv_freq and a.valid are not looked at. a.scores: [kPlanes, batch,
// q_heads, n], zeros.
template <int kDim, bool kBfloat>
KVC_DEVICE void non_causal(const KvcNonCausal& a, const KvcTurns& turns, const int32_t* places, const uint16_t* turned,
                           Shared<kDim>& shared) {
  using S = Shared<kDim>;
  const int blocks = (a.n + kTokens * S::kSixteens - 1) / (kTokens * S::kSixteens);
  const int b = blockIdx.x / blocks / a.kv_heads, h = blockIdx.x / blocks % a.kv_heads;
  const int start = blockIdx.x % blocks * kTokens * S::kSixteens;
  const Sequence sequence{places ? places[2 * b] : 0, places ? places[2 * b + 1] : a.n};
  if (start >= sequence.first + sequence.count || start + kTokens * S::kSixteens <= sequence.first) return;

  const uint16_t* keys = static_cast<const uint16_t*>(a.k) + b * a.k_b + h * a.k_h;
  const auto bring_sample = [&](int from) {
    bring<kDim, S::kPiece>(shared.sample, keys, a.k_t, sequence, [&](int i) {
      return sequence.first + sequence.sampled(from + i);
    });
  };
  bring<kDim, S::kNearRows>(shared.near, keys, a.k_t, sequence, [&](int i) { return start - kMargin + i; });
  bring<kDim, 8>(shared.sinks, keys, a.k_t, sequence, [&](int i) { return i < kSinks ? sequence.first + i : -1; });
  if (S::kPieces == 1) bring_sample(0);
  for (int i = threadIdx.x; i < kSample; i += blockDim.x) shared.place[i] = sequence.sampled(i);
  for (int i = threadIdx.x; i < kDim / 2; i += blockDim.x) {  // without pairs steps are zero
    const uint64_t step = turns.step[i], by = static_cast<int64_t>(sequence.first) + sequence.count - start;
    uint2* to = reinterpret_cast<uint2*>(shared.turn) + i;
    *to = uint2{static_cast<uint32_t>(step * by >> 32) + 0x80000000u, static_cast<uint32_t>(step >> 32)};
  }
  copies_done();
  __syncthreads();

  const int row = thread_warp() % S::kSixteens * kTokens, place = start + row - sequence.first;
  const int lane_place = place + (thread_lane() >> 2);
  const Item<kDim, kBfloat> item{a, sequence, shared, start + row, row,
                                 sequence.sampled_until(place - kMargin - 1),
                                 sequence.sampled_until(place + kTokens - 1 + kMargin),
                                 {sequence.each(lane_place), sequence.each(lane_place + 8)}};
  const bool empty = place >= sequence.count || place + kTokens <= 0;
  const int together = blockDim.x / 32 / S::kSixteens;  // heads
  KVC_UNROLL_BY(1)
  for (int first = 0; first < a.group; first += together) {
    const int in_group = first + thread_warp() / S::kSixteens;
    const bool idle = empty || in_group >= a.group;
    if (idle && S::kPieces == 1) continue;
    const int64_t head = static_cast<int64_t>(h) * a.group + in_group, heads = static_cast<int64_t>(a.kv_heads) * a.group;
    Queries<kDim> q;
    Softmax softmax{a.softcap > 0.f ? 1.f : dot_factor(a.scale, 0.f)};
    if (!idle) {
      item.load(q, static_cast<const uint16_t*>(a.q) + b * a.q_b + head * a.q_h, a.q_t);
      item.see_here(softmax, q);
      if (turned) item.load(q, turned + (b * heads + head) * a.n * kDim, kDim);
      else turn<kDim, kBfloat>(q, shared.turn, row + (thread_lane() >> 2));
    }
    KVC_UNROLL_BY(1)
    for (int piece = 0; piece < S::kPieces; piece++) {
      if (S::kPieces > 1) {
        __syncthreads();  // all are done with the piece before
        bring_sample(piece * S::kPiece);
        copies_done();
        __syncthreads();
      }
      if (!idle) item.see_sample(softmax, q, piece * S::kPiece);
    }
    const int64_t plane = static_cast<int64_t>((start + row) / kTokens % kPlanes) * gridDim.x / blocks * a.group;
    if (!idle) item.see_near(softmax, q, head, a.scores + (plane + b * heads + head) * a.n);
  }
}

}  // namespace

#define KVC_JOIN_(a, b, c) a##b##c
#define KVC_JOIN(a, b, c) KVC_JOIN_(a, b, c)
// Shared memory is declared here: g++ forgets the section of the shim's in a template.
#define KVC_NON_CAUSAL(bfloat, type)                                                                    \
  KVC_KERNEL __launch_bounds__(kThreads, KVC_HEAD_DIM > 128 ? 2 : 3)                                   \
  KVC_JOIN(kvc_non_causal_, KVC_HEAD_DIM, type)                                                         \
  (KVC_PARAMETER KvcNonCausal a, KVC_PARAMETER KvcTurns turns, const int32_t* places,                   \
   const uint16_t* turned) {                                                                            \
    __shared__ Shared<KVC_HEAD_DIM> shared;                                                             \
    non_causal<KVC_HEAD_DIM, bfloat>(a, turns, places, turned, shared);                                 \
  }
KVC_NON_CAUSAL(false, _f16)
KVC_NON_CAUSAL(true, _bf16)
#undef KVC_NON_CAUSAL
#undef KVC_JOIN
#undef KVC_JOIN_
