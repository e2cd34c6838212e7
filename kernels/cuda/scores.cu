// window_scores and column_scores on tensor cores, for head_dim 64, 128 or 256 in fp16 or bf16: adds up probabilities
// and their squares over the queries, or takes the largest, given every query's log-sum-exp (chunk.cu).
//
// A thread block takes 64 slots of a KV head, each of its warps 16 of them, whose keys it keeps in registers as
// operands. All queries of all heads of the KV head then pass by in shared memory, 64 at a time (32 at head_dim 256),
// each sixteen of one head: keys are read once, and sums of a slot never leave its warp.
//
// Compiled once for each head_dim, KVC_HEAD_DIM.
#include "tile.cuh"

namespace {

constexpr int kThreads = kTileThreads, kWarps = kThreads / 32;
constexpr int kSlots = 16 * kWarps;  // of a thread block
constexpr int kLargest = 4;          // in KvcScores::powers

template <int kDim>
struct Shared {
  // How many sixteens of queries pass by at once; at 256 dimensions there is room for two, and for spreading one.
  static constexpr int kChunks = kDim > 128 ? 2 : kWarps;
  uint4 tile[kSlots * kDim / 8];  // keys; then the operands of the queries
  float4 key[kSlots];             // SlotParams
  float query_sum[kChunks][16], norm[kChunks][16];
};

// The sum of two numbers, or the larger one.
KVC_DEVICE float joined(float a, float b, bool largest) { return !largest ? a + b : b > a ? b : a; }

template <int kDim, bool kBfloat>
KVC_DEVICE void products(float (&c)[2][4], const uint32_t (&keys)[kDim / 16][4], const uint4* queries) {
  KVC_UNROLL
  for (int step = 0; step < kDim / 16; step++) {
    const uint4 q = queries[step * 32 + thread_lane()];
    const uint32_t a[4] = {q.x, q.y, q.z, q.w};
    multiply<kBfloat>(c[0], a, keys[step][0], keys[step][1]);
    multiply<kBfloat>(c[1], a, keys[step][2], keys[step][3]);
  }
}

// Grid: batch x kv_heads x `tiles` of 64 slots: those of each tier, then the tail's, then the new tokens'. The sums are
// zero before.
template <int kDim, bool kBfloat>
KVC_DEVICE void scores(const KvcLayout& layout, const KvcScores& a, const float* lse, int tiles, Shared<kDim>& shared) {
  const int row = blockIdx.x / tiles, b = row / a.kv_heads, h = row % a.kv_heads;
  const Sections<kDim> sections{layout, a.rows, a.tail, a.k, nullptr, a.k_b, a.k_h, a.k_t, 0, 0, 0, a.key_valid,
                                a.n_k, a.key_position, a.position_field, true, b, h, row};
  int index = blockIdx.x % tiles, section = 0;
  for (; section < kFresh; section++) {
    const int64_t width = section == kTail ? a.tail.capacity : section < layout.n_tiers ? a.past_stride[section] : 0;
    const int here = static_cast<int>((width + kSlots - 1) / kSlots);
    if (index < here) break;
    index -= here;
  }
  const int first = index * kSlots, length = sections.length(section);
  if (first >= length) return;  // the whole block: its sums are zero already

  const int warp = thread_warp(), g = thread_lane() >> 2, t = thread_lane() & 3, own = warp * 16;
  uint32_t keys[kDim / 16][4];
  {
    Words<kDim, 16> words;
    uint4* tile = shared.tile + own * (kDim / 8);
    const Place place = sections.template find<16>(section, length, first + own);
    sections.template fetch<16>(words, tile, section, place, true);
    const auto raw = sections.fetch_params(section, place, thread_lane());
    sections.template spread<16>(words, tile, section, true);
    if (thread_lane() < 16) {
      const bool there = first + own + thread_lane() < length;
      float4 key = sections.params(section, raw, dot_factor(a.scale, a.softcap), there).key;
      if (there && raw.valid) key.z = 0.f;  // values do not matter here
      shared.key[own + thread_lane()] = key;
    }
    copies_done();
    __syncwarp();
    KVC_UNROLL
    for (int step = 0; step < kDim / 16; step++) key_operands<kDim>(keys[step], tile, step, thread_lane());
  }
  // Queries that can see something of the tile; of new tokens that is not all of them.
  const bool fresh = section == kFresh, placed = sections.placed(section), native = sections.bits(section, true) == 0;
  int from = 0, until = a.n_q;
  if (fresh) {
    const int64_t ahead = static_cast<int64_t>(a.key_position) + first - a.position;  // of the first slot, of query 0
    const int64_t begin = ahead + most(a.exclude, 0);
    from = begin <= 0 ? 0 : static_cast<int>(begin < a.n_q ? begin : a.n_q);
    const int64_t end = ahead + least(kSlots, length - first) - 1 + a.window;
    if (a.window > 0 && end < until) until = end > from ? static_cast<int>(end) : from;
  }
  const int chunks = (until - from + 15) / 16, all = chunks * a.group;  // sixteen queries of a head
  const bool largest = a.powers & kLargest;
  const int64_t heads = static_cast<int64_t>(a.kv_heads) * a.group;
  float total[4] = {0.f, 0.f, 0.f, 0.f}, square[4] = {0.f, 0.f, 0.f, 0.f};
  constexpr int at_once = Shared<kDim>::kChunks;
  // Where row m of a sixteen is; null: there is none.
  const auto query_at = [&](int chunk, int m) -> const uint16_t* {
    const int query = from + chunk % chunks * 16 + m;
    const int64_t head = static_cast<int64_t>(h) * a.group + chunk / chunks;
    if (chunk >= all || query >= until) return nullptr;
    if (a.query_valid && !a.query_valid[static_cast<int64_t>(b) * a.n_q + query]) return nullptr;
    return static_cast<const uint16_t*>(a.q) + b * a.q_b + head * a.q_h + query * a.q_t;
  };
  const bool rotated = sections.rotated(section), as_bfloat = kBfloat && native;
  for (int start = 0; start < all; start += at_once) {
    __syncthreads();  // the keys, or the queries before, are done with
    float (*spread)[kDim] = reinterpret_cast<float (*)[kDim]>(shared.tile + at_once * 2 * kDim);
    for (int i = 0; kDim > 128 && i < at_once; i++) {
      spread_queries<kDim, kBfloat>(spread, rotated, [&](int m) { return query_at(start + i, m); });
      if (warp != i) continue;
      for (int m = 0; m < 2; m++) {
        uint32_t* to = reinterpret_cast<uint32_t*>(&shared.tile[warp * 2 * kDim + thread_lane()]) + m;
        const float sum = stage_spread_query<kDim>(
            spread[g + 8 * m], as_bfloat, [&](int i, uint32_t word) { to[i / 2 * 128 + i % 2 * 2] = word; });
        if (t == 0) shared.query_sum[warp][g + 8 * m] = sum;
      }
    }
    KVC_UNROLL_BY(1)
    for (int m = 0; m < 2 && warp < at_once; m++) {
      const int chunk = start + warp, query = from + chunk % chunks * 16 + g + 8 * m;
      const int64_t head = static_cast<int64_t>(h) * a.group + chunk / chunks;
      const uint16_t* q = query_at(chunk, g + 8 * m);
      if constexpr (kDim <= 128) {
        uint32_t* to = reinterpret_cast<uint32_t*>(&shared.tile[warp * 2 * kDim + thread_lane()]) + m;
        const float sum = stage_query<kDim, kBfloat>(
            q, rotated, as_bfloat, [&](int i, uint32_t word) { to[i / 2 * 128 + i % 2 * 2] = word; });
        if (t == 0) shared.query_sum[warp][g + 8 * m] = sum;
      }
      if (t == 0) {
        const float norm = q ? lse[(b * heads + head) * a.n_q + query] : -infinity();
        // One that sees nothing counts nowhere.
        shared.norm[warp][g + 8 * m] = norm > -infinity() ? norm * kLog2E : infinity();
      }
    }
    __syncthreads();
    for (int w = 0; w < at_once && start + w < all; w++) {
      const int chunk = start + w, query = from + chunk % chunks * 16;
      float c[2][4];
      KVC_UNROLL
      for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0.f;
      const uint4* queries = shared.tile + w * 2 * kDim;
      if (kBfloat && native) products<kDim, true>(c, keys, queries);
      else products<kDim, false>(c, keys, queries);
      const bool special = a.softcap > 0.f || (placed && (a.window > 0 || a.exclude > 0)) ||
                           (fresh && a.position + query < a.key_position + first + kSlots - 1);
      KVC_UNROLL
      for (int i = 0; i < 4; i++) {
        const float4 slot = shared.key[own + i / 2 * 8 + 2 * t + i % 2];
        KVC_UNROLL
        for (int m = 0; m < 2; m++) {
          const float norm = shared.norm[w][g + 8 * m], sum = shared.query_sum[w][g + 8 * m];
          float x = c[i / 2][2 * m + i % 2] * slot.x + sum * slot.y;
          if (special) {
            if (a.softcap > 0.f) x = capped(x, a.softcap);
            const int distance = a.position + query + g + 8 * m - static_cast<int>(float_bits(slot.w));
            bool counts = !fresh || distance >= 0;
            if (placed && a.window > 0) counts = counts && distance < a.window;
            if (placed && a.exclude > 0) counts = counts && distance >= a.exclude;
            if (!counts) x = -infinity();
          }
          const float p = fast_exp2(x + slot.z - norm);
          total[i] = joined(total[i], p, largest);
          square[i] += p * p;
        }
      }
      if ((chunk + 1) % chunks) continue;
      // The last queries of a head.
      const int64_t at = b * heads + static_cast<int64_t>(h) * a.group + chunk / chunks;
      KVC_UNROLL
      for (int i = 0; i < 4; i++) {
        KVC_UNROLL
        for (int bit = 4; bit < 32; bit *= 2) {
          total[i] = joined(total[i], __shfl_xor_sync(kAllLanes, total[i], bit), largest);
          square[i] += __shfl_xor_sync(kAllLanes, square[i], bit);
        }
        const int s = first + own + i / 2 * 8 + 2 * t + i % 2;
        KVC_UNROLL
        for (int power = 0; power < 2; power++) {
          if (g != 0 || s >= length || !(a.powers >> power & 1)) continue;
          const KvcSums& to = power ? a.square : a.sum;
          const float x = power ? square[i] : total[i];
          if (fresh) to.fresh[at * a.n_k + s] = x;
          else if (section == kTail) to.tail[at * a.tail.capacity + s] = x;
          else to.past[section][at * a.past_stride[section] + s] = x;
        }
        total[i] = square[i] = 0.f;
      }
    }
  }
}

}  // namespace

#define KVC_JOIN_(a, b, c) a##b##c
#define KVC_JOIN(a, b, c) KVC_JOIN_(a, b, c)
// Shared memory is declared here: g++ forgets the section of the shim's in a template.
#define KVC_SCORES(bfloat, type)                                                                        \
  KVC_KERNEL __launch_bounds__(kThreads, KVC_HEAD_DIM > 128 ? 2 : 3)                                    \
  KVC_JOIN(kvc_scores_, KVC_HEAD_DIM, type)                                                             \
  (KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcScores a, const float* lse, int32_t tiles) {        \
    __shared__ Shared<KVC_HEAD_DIM> shared;                                                             \
    scores<KVC_HEAD_DIM, bfloat>(layout, a, lse, tiles, shared);                                        \
  }
KVC_SCORES(false, _f16)
KVC_SCORES(true, _bf16)
#undef KVC_SCORES
#undef KVC_JOIN
#undef KVC_JOIN_
