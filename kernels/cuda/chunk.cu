// chunk_attention on tensor cores, for head_dim 64, 128 or 256 in fp16 or bf16: later chunks of a prompt, second turns,
// assisted decoding; without an output, the log-sum-exp that scores start from.
//
// A thread block takes up to 64 query rows of a KV head (row m is query m / group, head m % group of the group) and
// goes over the packed tiers, the tail and the new tokens in tiles of 64 slots (32 at head_dim 256), in the manner of
// FlashAttention-2: keys and values are brought into shared memory once per tile for all rows, those of the next step
// being under way while this one is computed. Codes stay integers (exact in fp16); a key's scale and offset go to the
// logit, a value's to the probability. Where there are few rows, warps share them and take different slots.
//
// Work is a flat list of tiles over all query tiles of all rows, by the lengths on the device and by what causality
// and the window leave of the new tokens; every thread block takes an equal part of it, and what several share is
// merged by whichever of them finishes last.
//
// Compiled once for each head_dim, KVC_HEAD_DIM.
#include "tile.cuh"

namespace {

constexpr int kThreads = kTileThreads, kWarps = kThreads / 32;
constexpr int kLeastTiles = 2;  // per thread block: less is not worth merging

template <int kDim, int kRowWarps>
struct Shape {
  static constexpr int kSlots = kDim > 128 ? 32 : 64;       // of a tile
  static constexpr int kBrought = kSlots / kWarps;          // by each warp
  static constexpr int kRows = 16 * kRowWarps;              // of queries
  static constexpr int kSlotWarps = kWarps / kRowWarps;     // warps that have the same rows
  static constexpr int kBlocks = kSlots / 16 / kSlotWarps;  // of 16 slots, of a tile, that a warp computes with
  // Which of them this warp is, so that it takes blocks mine(), mine() + kSlotWarps ...
  KVC_DEVICE_METHOD static int mine() { return kSlotWarps == 1 ? 0 : thread_warp() / kRowWarps; }
  static constexpr int kSteps = kDim / 16;                  // of the dot products
  // Of these, how many have their queries in shared memory, as far as there is room; the others, in registers.
  static constexpr int kStaged = kDim > 128 ? kSteps - 2 : kDim == 128 && kRowWarps == 4 ? kSteps - 2 : kSteps;
};

struct Parts {  // the list of tiles cut into equal parts, one for each thread block
  int each, more;  // tiles of a part; so many parts have one more
  KVC_DEVICE_METHOD int begin(int part) const { return part * each + least(part, more); }
  KVC_DEVICE_METHOD int of(int tile) const {  // the part that a tile is in
    const int longer = more * (each + 1);
    return tile < longer ? tile / (each + 1) : more + (tile - longer) / each;
  }
};

struct Span {  // tiles from .. until, of an item that is begin .. end of the list
  int item, begin, end, from, until;
  Parts parts;
};

template <int kDim, int kRowWarps>
struct Shared {
  using S = Shape<kDim, kRowWarps>;
  uint4 tile[2][S::kSlots * kDim / 8];  // keys, values; float [rows][kDim] of outputs when a query tile is done
  uint4 queries[kRowWarps][S::kStaged][32];
  float4 key[2][S::kSlots];             // SlotParams of this tile and the next
  float2 value[2][S::kSlots];
  int length[KVC_MAX_TIERS + 2], fresh_first;
  int scan[kWarps];
  Span span;                            // what a thread block is about: not in registers meanwhile
  int last;
  // Of each warp's rows, in the end, when queries are done with.
  KVC_DEVICE_METHOD float (*top())[16] { return reinterpret_cast<float (*)[16]>(queries); }
  KVC_DEVICE_METHOD float (*sum())[16] { return top() + kWarps; }
  KVC_DEVICE_METHOD float (*out())[kDim] { return reinterpret_cast<float (*)[kDim]>(tile); }
};

// A list of tiles: those of query tile 0 of row 0, of query tile 1, and so on.
template <int kDim, int kRowWarps>
struct Task {
  using S = Shape<kDim, kRowWarps>;
  const KvcLayout& layout;
  const KvcChunk& a;
  int query_tiles;

  KVC_DEVICE_METHOD int first_row(int item) const { return item % query_tiles * S::kRows; }
  KVC_DEVICE_METHOD int first_query(int item) const { return first_row(item) / a.group; }
  KVC_DEVICE_METHOD int last_query(int item) const {
    return least((first_row(item) + S::kRows - 1) / a.group, a.n_q - 1);
  }
  // New tokens that some query of an item may see: from the start of a tile on.
  KVC_DEVICE_METHOD int fresh_first(int item) const {
    if (a.window <= 0) return 0;
    const int64_t oldest = static_cast<int64_t>(a.position) + first_query(item) - a.window + 1 - a.key_position;
    return oldest <= 0 ? 0 : static_cast<int>(oldest < a.n_k ? oldest : a.n_k) / S::kSlots * S::kSlots;
  }
  KVC_DEVICE_METHOD int fresh_end(int item) const {
    if (a.allowed) return a.n_k;
    return most(0, least(a.position - a.key_position + last_query(item) + 1, a.n_k));
  }
  KVC_DEVICE_METHOD int length(int item, int section) const {
    const int row = item / query_tiles;
    if (section == kFresh) return fresh_end(item);
    if (section == kTail) return a.tail.capacity ? a.tail.length[row / a.kv_heads] : 0;
    return section < layout.n_tiers ? a.rows.length[section][row] : 0;
  }
  KVC_DEVICE_METHOD int tiles(int item) const {  // at least one, so that every query tile is visited
    int n = (most(0, fresh_end(item) - fresh_first(item)) + S::kSlots - 1) / S::kSlots;
    KVC_UNROLL
    for (int s = 0; s <= kTail; s++) n += (length(item, s) + S::kSlots - 1) / S::kSlots;
    return n > 0 ? n : 1;
  }
};

// Tiles of items 0 .. items; where `target` is given, also the item it falls into and where that begins.
template <int kDim, int kRowWarps>
KVC_DEVICE int count_tiles(const Task<kDim, kRowWarps>& task, int items, int target,
                           Shared<kDim, kRowWarps>& shared) {
  int before = 0;
  for (int first = 0; first < items && before <= target; first += kThreads) {
    const int item = first + threadIdx.x;
    const int mine = item < items ? task.tiles(item) : 0;
    int running = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_sync(kAllLanes, running, thread_lane() - step);
      if (thread_lane() >= step) running += other;
    }
    if (thread_lane() == 31) shared.scan[thread_warp()] = running;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w < thread_warp()) running += shared.scan[w];
      all += shared.scan[w];
    }
    const int end = before + running;
    if (mine && target >= end - mine && target < end) shared.span.item = item, shared.span.begin = end - mine;
    before += all;
    __syncthreads();
  }
  return before;
}

// Running softmax of one warp. Lane (g, t) holds rows g and g + 8, and of each eight dimensions 2t and 2t + 1.
template <int kDim>
struct Running {
  float o[kDim / 8][4];
  float top[2], sum[2], offset[2];  // offset: sum of probability x value offset, the same for every dimension

  KVC_DEVICE_METHOD void clear() {
    KVC_UNROLL
    for (int i = 0; i < kDim / 8; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    KVC_UNROLL
    for (int i = 0; i < 2; i++) top[i] = kLowest, sum[i] = offset[i] = 0.f;
  }
};

template <int kDim, int kRowWarps>
struct Queries {  // of a warp's rows
  using S = Shape<kDim, kRowWarps>;
  uint32_t kept[S::kSteps > S::kStaged ? S::kSteps - S::kStaged : 1][4];  // steps kStaged and on
  float sum[2];                              // over the dimensions, as rounded
  int query[2];                              // which of the chunk they are; n_q or more: no such row

  KVC_DEVICE_METHOD static int row(int first_row, int m) {
    return first_row + thread_warp() % kRowWarps * 16 + (thread_lane() >> 2) + 8 * m;
  }
  // Puts them in the form that a section wants. The block must be done with those before.
  template <bool kBfloat>
  KVC_DEVICE_METHOD void stage(Shared<kDim, kRowWarps>& shared, const KvcChunk& a, int first_row, int b, int h,
                               bool rotated, bool as_bfloat) {
    const auto row_at = [&](int at) -> const uint16_t* {
      const int query = at / a.group;
      const int64_t head = static_cast<int64_t>(h) * a.group + at % a.group;
      return query < a.n_q ? static_cast<const uint16_t*>(a.q) + b * a.q_b + head * a.q_h + query * a.q_t : nullptr;
    };
    KVC_UNROLL_BY(1)
    for (int w = 0; w < (kDim > 128 ? kRowWarps : 1); w++) {
      float (*spread)[kDim] = reinterpret_cast<float (*)[kDim]>(shared.tile[1]);
      if (kDim > 128) {
        spread_queries<kDim, kBfloat>(spread, rotated, [&](int m) { return row_at(first_row + 16 * w + m); });
        if (thread_warp() % kRowWarps != w) continue;
      }
      KVC_UNROLL_BY(1)  // one row after the other: there are no registers for both
      for (int m = 0; m < 2; m++) {
        const int at = row(first_row, m);
        uint32_t* to = reinterpret_cast<uint32_t*>(&shared.queries[thread_warp() % kRowWarps][0][thread_lane()]) + m;
        const auto put = [&](int i, uint32_t word) {
          if (i / 2 < S::kStaged) {
            if (S::mine() == 0) to[i / 2 * 128 + i % 2 * 2] = word;
          } else if (m == 0) {
            kept[i / 2 - S::kStaged][i % 2 * 2] = word;
          } else {
            kept[i / 2 - S::kStaged][i % 2 * 2 + 1] = word;
          }
        };
        float total;
        if constexpr (kDim > 128) total = stage_spread_query<kDim>(spread[at % 16], as_bfloat, put);
        else total = stage_query<kDim, kBfloat>(row_at(at), rotated, as_bfloat, put);
        if (m == 0) sum[0] = total, query[0] = at / a.group;
        else sum[1] = total, query[1] = at / a.group;
      }
    }
    __syncthreads();
  }
};

// A warp's logits of a tile, as dot products: c[block][eight slots][element].
template <int kDim, int kRowWarps, bool kBfloat>
KVC_DEVICE void products(float (*c)[2][4], const Queries<kDim, kRowWarps>& q, Shared<kDim, kRowWarps>& shared) {
  using S = Shape<kDim, kRowWarps>;
  const int lane = renewed(thread_lane());
  const uint4* tile = shared.tile[0] + S::mine() * 2 * kDim;  // from this warp's first block on
  KVC_UNROLL
  for (int step = 0; step < S::kSteps; step++) {
    uint32_t a[4];
    if (step < S::kStaged) {
      const uint4 x = shared.queries[thread_warp() % kRowWarps][step][thread_lane()];
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
    } else {
      KVC_UNROLL
      for (int i = 0; i < 4; i++) a[i] = q.kept[step - S::kStaged][i];
    }
    KVC_UNROLL
    for (int j = 0; j < S::kBlocks; j++) {
      uint32_t b[4];
      key_operands<kDim>(b, tile + j * S::kSlotWarps * 2 * kDim, step, lane);
      multiply<kBfloat>(c[j][0], a, b[0], b[1]);
      multiply<kBfloat>(c[j][1], a, b[2], b[3]);
    }
  }
}

// Adds a block of 16 slots' probabilities times values.
template <int kDim, bool kBfloat>
KVC_DEVICE void add_values(Running<kDim>& run, const uint32_t (&p)[4], const uint4* tile, int lane) {
  KVC_UNROLL
  for (int step = 0; step < kDim / 16; step++) {
    uint32_t b[4];
    value_operands<kDim>(b, tile, step, lane);
    multiply<kBfloat>(run.o[2 * step], p, b[0], b[1]);
    multiply<kBfloat>(run.o[2 * step + 1], p, b[2], b[3]);
  }
}

// Dot products -> logits in powers of two, with the logarithm of the value's scale added: what the running maximum is
// of, so that scaled probabilities use the range of fp16 well. `first`: the tile's first slot in its section.
template <int kDim, int kRowWarps>
KVC_DEVICE void logits(float (*c)[2][4], const Queries<kDim, kRowWarps>& q, const KvcChunk& a, const float4* key,
                       int section, int first, int b, bool masked) {
  using S = Shape<kDim, kRowWarps>;
  const int mine = S::mine() * 16 + (thread_lane() & 3) * 2;
  const bool cap = a.softcap > 0.f;
  KVC_UNROLL
  for (int i = 0; i < S::kBlocks * 4; i++) {
    const float4 s = key[mine + i / 4 * S::kSlotWarps * 16 + i / 2 % 2 * 8 + i % 2];
    KVC_UNROLL
    for (int m = 0; m < 2; m++) {
      float& x = c[i / 4][i / 2 % 2][2 * m + i % 2];
      x = x * s.x + (q.sum[m] * s.y + (cap ? 0.f : s.z));
      if (cap) x = capped(x, a.softcap) + s.z;
    }
  }
  if (!masked) return;
  const bool fresh = section == kFresh;
  // Masks and biases of this lane's two queries, from its first slot on.
  const uint8_t* allowed[2] = {nullptr, nullptr};
  const float* bias[2] = {nullptr, nullptr};
  KVC_UNROLL
  for (int m = 0; m < 2 && fresh; m++) {
    const int64_t row = (static_cast<int64_t>(b) * a.n_q + q.query[m]) * a.n_k + first + mine;
    if (a.allowed && q.query[m] < a.n_q) allowed[m] = a.allowed + row;
    if (a.bias && q.query[m] < a.n_q) bias[m] = a.bias + row;
  }
  const int left = fresh ? a.n_k - first - mine : S::kSlots;  // slots from this lane's first to the end
  uint32_t hidden = 0;  // a bit for each logit
  KVC_UNROLL_BY(1)
  for (int i = 0; i < S::kBlocks * 4; i++) {
    const int slot = i / 4 * S::kSlotWarps * 16 + i / 2 % 2 * 8 + i % 2;
    const int position = static_cast<int>(float_bits(key[mine + slot].w));
    KVC_UNROLL
    for (int m = 0; m < 2; m++) {
      const int distance = a.position + q.query[m] - position;
      bool seen = a.window <= 0 || distance < a.window;
      if (allowed[m]) seen = seen && slot < left && allowed[m][slot];
      else if (fresh) seen = seen && !a.allowed && distance >= 0;
      if (!seen) hidden |= 1u << (4 * (i / 2) + 2 * m + i % 2);
    }
  }
  KVC_UNROLL
  for (int i = 0; i < S::kBlocks * 8; i++) {
    float& x = c[i / 8][i / 4 % 2][i % 4];
    const int slot = i / 8 * S::kSlotWarps * 16 + i / 4 % 2 * 8 + i % 2;
    if (bias[i / 2 % 2] && slot < left) x += bias[i / 2 % 2][slot] * kLog2E;
    if (hidden >> i & 1) x = -infinity();
  }
}

// Joins the warps that share rows: outputs into shared.out(), largest logits and sums into the first of them.
template <int kDim, int kRowWarps>
KVC_DEVICE void join_warps(Running<kDim>& run, Shared<kDim, kRowWarps>& shared, bool with_out) {
  using S = Shape<kDim, kRowWarps>;
  const int thread = renewed(threadIdx.x), warp = thread / 32, row_warp = warp % kRowWarps, mine = warp / kRowWarps;
  const int g = thread % 32 >> 2, t = thread & 3;
  KVC_UNROLL
  for (int m = 0; m < 2; m++) {
    KVC_UNROLL
    for (int bit = 1; bit < 4; bit *= 2) {
      run.sum[m] += __shfl_xor_sync(kAllLanes, run.sum[m], bit);
      run.offset[m] += __shfl_xor_sync(kAllLanes, run.offset[m], bit);
    }
    if (t == 0) shared.top()[warp][g + 8 * m] = run.top[m], shared.sum()[warp][g + 8 * m] = run.sum[m];
  }
  __syncthreads();  // and the tiles are done with
  float fade[2];
  KVC_UNROLL
  for (int m = 0; m < 2; m++) {
    float top = kLowest;
    for (int w = 0; w < S::kSlotWarps; w++) {
      const float other = shared.top()[row_warp + w * kRowWarps][g + 8 * m];
      top = other > top ? other : top;
    }
    fade[m] = fast_exp2(run.top[m] - top);
  }
  for (int w = 0; w < S::kSlotWarps && with_out; w++) {
    if (mine == w) {
      KVC_UNROLL
      for (int j = 0; j < kDim / 8; j++) {
        KVC_UNROLL
        for (int m = 0; m < 2; m++) {
          float2& to = *reinterpret_cast<float2*>(&shared.out()[row_warp * 16 + g + 8 * m][8 * j + 2 * t]);
          const float x = (run.o[j][2 * m] + run.offset[m]) * fade[m];
          const float y = (run.o[j][2 * m + 1] + run.offset[m]) * fade[m];
          to = w == 0 ? float2{x, y} : float2{to.x + x, to.y + y};
        }
      }
    }
    __syncthreads();
  }
  if (thread < S::kRows) {
    const int of = thread / 16, m = thread % 16;
    float top = kLowest, sum = 0.f;
    for (int w = 0; w < S::kSlotWarps; w++) {
      const float other = shared.top()[of + w * kRowWarps][m];
      top = other > top ? other : top;
    }
    for (int w = 0; w < S::kSlotWarps; w++) {
      sum += shared.sum()[of + w * kRowWarps][m] * fast_exp2(shared.top()[of + w * kRowWarps][m] - top);
    }
    shared.top()[of][m] = top, shared.sum()[of][m] = sum;
  }
  __syncthreads();
}

// Adds what was evicted from a KV head, as one slot, to the sums over all others; a warp for each row of queries.
template <int kDim, bool kBfloat, int kRowWarps>
KVC_DEVICE void add_evicted(const KvcChunk& a, int first_row, int b, int h, Shared<kDim, kRowWarps>& shared) {
  using S = Shape<kDim, kRowWarps>;
  const int64_t kv_row = static_cast<int64_t>(b) * a.kv_heads + h;
  const int count = a.rows.evicted_counts ? a.rows.evicted_counts[kv_row] : 0;
  if (count <= 0) return;
  const auto as_float = [](uint16_t x) { return kBfloat ? bfloat_to_float(x) : half_to_float(x); };
  const uint16_t* mean = static_cast<const uint16_t*>(a.rows.evicted_means) + kv_row * 2 * kDim;
  const int warp = renewed(thread_warp()), lane = renewed(thread_lane());
  KVC_UNROLL_BY(1)
  for (int m = warp; m < S::kRows && (first_row + m) / a.group < a.n_q; m += kWarps) {
    const int64_t head = static_cast<int64_t>(h) * a.group + (first_row + m) % a.group;
    const uint16_t* q =
        static_cast<const uint16_t*>(a.q) + b * a.q_b + head * a.q_h + (first_row + m) / a.group * a.q_t;
    float x = 0.f;
    for (int d = lane; d < kDim; d += 32) x += as_float(q[d]) * as_float(mean[d]);
    KVC_UNROLL
    for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
    x *= dot_factor(a.scale, a.softcap);
    if (a.softcap > 0.f) x = capped(x, a.softcap);
    x += fast_log2(static_cast<float>(count));
    float &top = shared.top()[m / 16][m % 16], &sum = shared.sum()[m / 16][m % 16];
    const float high = larger(x, top), fade = fast_exp2(top - high), weight = fast_exp2(x - high);
    for (int d = lane; d < kDim && a.out; d += 32) {
      float& o = shared.out()[m][d];
      o = o * fade + weight * as_float(mean[kDim + d]);
    }
    __syncwarp();  // all have read what changes
    if (lane == 0) top = high, sum = sum * fade + weight;
  }
  __syncthreads();
}

// Divides by the denominators (sinks included) and writes the rows of an item.
template <int kDim, bool kBfloat, int kRowWarps>
KVC_DEVICE void finish(const KvcChunk& a, int first_row, int b, int h, Shared<kDim, kRowWarps>& shared) {
  using S = Shape<kDim, kRowWarps>;
  add_evicted<kDim, kBfloat, kRowWarps>(a, first_row, b, h, shared);
  const int thread = renewed(threadIdx.x);
  if (thread < S::kRows) {
    const int row = first_row + thread, query = row / a.group;
    const int64_t head = static_cast<int64_t>(h) * a.group + row % a.group;
    float top = shared.top()[thread / 16][thread % 16], fade = 1.f;
    float& sum = shared.sum()[thread / 16][thread % 16];
    if (a.sinks) {
      const float sink = a.sinks[head] * kLog2E, high = sink > top ? sink : top;
      fade = fast_exp2(top - high);
      sum = sum * fade + fast_exp2(sink - high);
      top = high;
    }
    if (a.lse && query < a.n_q) {
      const int64_t heads = static_cast<int64_t>(a.kv_heads) * a.group;
      a.lse[(b * heads + head) * a.n_q + query] = sum > 0.f ? (top + fast_log2(sum)) * kLn2 : -infinity();
    }
    sum = sum > 0.f ? fade / sum : 0.f;
  }
  __syncthreads();
  for (int i = thread; a.out && i < S::kRows * kDim / 2; i += kThreads) {
    const int m = i / (kDim / 2), d = i % (kDim / 2) * 2, row = first_row + m, query = row / a.group;
    if (query >= a.n_q) break;
    const int64_t head = static_cast<int64_t>(h) * a.group + row % a.group;
    const float norm = shared.sum()[m / 16][m % 16], x = shared.out()[m][d] * norm, y = shared.out()[m][d + 1] * norm;
    uint16_t* out = static_cast<uint16_t*>(a.out) + b * a.out_b + query * a.out_t + head * a.out_h;
    *reinterpret_cast<uint32_t*>(out + d) = kBfloat ? pack_bfloats(x, y) : pack_halves(x, y);
  }
  __syncthreads();
}

template <int kDim, bool kBfloat, int kRowWarps>
KVC_DEVICE void chunk(const KvcLayout& layout, const KvcChunk& a, const uint8_t* key_valid, const KvcPartials& w,
                      Shared<kDim, kRowWarps>& shared) {
  using S = Shape<kDim, kRowWarps>;
  const Task<kDim, kRowWarps> task{layout, a, (a.n_q * a.group + S::kRows - 1) / S::kRows};
  const int items = a.batch * a.kv_heads * task.query_tiles;
  const int tiles = count_tiles<kDim, kRowWarps>(task, items, 0x7fffffff, shared);
  const int count = least(gridDim.x, most(tiles / kLeastTiles, 1)), me = blockIdx.x;
  if (me >= count) return;
  const Parts parts{tiles / count, tiles % count};
  count_tiles<kDim, kRowWarps>(task, items, parts.begin(me), shared);
  Span span = shared.span;
  span.parts = parts, span.from = parts.begin(me);

  const float factor = dot_factor(a.scale, a.softcap);
  const int own = thread_warp() * S::kBrought;  // slots that this warp brings
  uint4 *const own_keys = shared.tile[0] + own * (kDim / 8), *const own_values = shared.tile[1] + own * (kDim / 8);
  while (span.from < span.parts.begin(me + 1)) {
    const int item = span.item, row = item / task.query_tiles, b = row / a.kv_heads, h = row % a.kv_heads;
    const int first_row = task.first_row(item);
    const Sections<kDim> sections{layout, a.rows, a.tail, a.k, a.v, a.k_b, a.k_h, a.k_t, a.v_b, a.v_h, a.v_t, key_valid,
                                  a.n_k, a.key_position, a.position_field, a.window > 0, b, h, row};
    span.end = span.begin + task.tiles(item);
    span.until = least(span.end, span.parts.begin(me + 1));
    int left = span.until - span.from;  // tiles to do
    __syncthreads();
    if (threadIdx.x <= kFresh) shared.length[threadIdx.x] = task.length(item, threadIdx.x);
    if (threadIdx.x == 0) shared.fresh_first = task.fresh_first(item), shared.span = span;
    __syncthreads();
    // The first of them: a section, and a slot in it.
    int section = 0, first = 0;
    for (int skip = span.from - span.begin; section <= kFresh; section++) {
      first = section == kFresh ? shared.fresh_first : 0;
      const int n = (most(0, shared.length[section] - first) + S::kSlots - 1) / S::kSlots;
      if (skip < n) {
        first += skip * S::kSlots;
        break;
      }
      skip -= n;
    }
    if (section > kFresh) left = 0;  // an item without anything to see

    Queries<kDim, kRowWarps> queries;
    Running<kDim> run;
    run.clear();
    Words<kDim, S::kBrought> words;
    Place place;
    int form = -1, parity = 0;  // which form the queries are in; which params are this tile's
    if (left > 0) {
      place = sections.template find<S::kBrought>(section, shared.length[section], first + own);
      sections.template fetch<S::kBrought>(words, own_keys, section, place, true);
      const auto raw = sections.fetch_params(section, place, thread_lane());
      sections.template spread<S::kBrought>(words, own_keys, section, true);
      if (thread_lane() < S::kBrought) {
        const int slot = own + thread_lane();
        const SlotParams p = sections.params(section, raw, factor, first + slot < shared.length[section]);
        shared.key[0][slot] = p.key, shared.value[0][slot] = p.value;
      }
    }
    for (; left > 0; left--) {
      copies_done();
      __syncthreads();  // keys are there, and the values before are done with
      const bool native = sections.bits(section, true) == 0;
      const int wanted = sections.rotated(section) + 2 * (kBfloat && native);
      if (form != wanted) {
        form = wanted;
        queries.template stage<kBfloat>(shared, a, first_row, b, h, form & 1, form & 2);
      }
      if (a.out) sections.template fetch<S::kBrought>(words, own_values, section, place, false);
      int next_section = section, next = first + S::kSlots;
      if (left > 1) {
        while (next >= shared.length[next_section]) {
          next_section++;
          next = next_section == kFresh ? shared.fresh_first : 0;
        }
        place = sections.template find<S::kBrought>(next_section, shared.length[next_section], next + own);
      }

      float c[S::kBlocks][2][4];
      KVC_UNROLL
      for (int i = 0; i < S::kBlocks * 8; i++) c[i / 8][i / 4 % 2][i % 4] = 0.f;
      if (kBfloat && native) products<kDim, kRowWarps, true>(c, queries, shared);
      else products<kDim, kRowWarps, false>(c, queries, shared);

      if (a.out) sections.template spread<S::kBrought>(words, own_values, section, false);
      copies_done();
      __syncthreads();  // values are there, and the keys are done with
      typename Sections<kDim>::Raw raw;
      if (left > 1) {
        sections.template fetch<S::kBrought>(words, own_keys, next_section, place, true);
        raw = sections.fetch_params(next_section, place, thread_lane());
      }

      // Some may not see all: with causality, whoever is before the last of these slots.
      const bool masked = (a.window > 0 && sections.placed(section)) ||
                          (section == kFresh && (a.allowed || a.bias ||
                                                 a.key_position + least(first + S::kSlots, a.n_k) - 1 >
                                                     a.position + first_row / a.group));
      logits<kDim, kRowWarps>(c, queries, a, shared.key[parity], section, first, b, masked);
      float high[2] = {run.top[0], run.top[1]}, fade[2];
      KVC_UNROLL
      for (int i = 0; i < S::kBlocks * 8; i++) {
        high[i / 2 % 2] = larger(high[i / 2 % 2], c[i / 8][i / 4 % 2][i % 4]);
      }
      bool moved = false;
      KVC_UNROLL
      for (int m = 0; m < 2; m++) {
        KVC_UNROLL
        for (int bit = 1; bit < 4; bit *= 2) {
          high[m] = larger(high[m], __shfl_xor_sync(kAllLanes, high[m], bit));
        }
        moved = moved || high[m] > run.top[m];
        fade[m] = fast_exp2(run.top[m] - high[m]);
        run.top[m] = high[m];
      }
      if (__any_sync(kAllLanes, moved)) {
        KVC_UNROLL
        for (int m = 0; m < 2; m++) run.sum[m] *= fade[m], run.offset[m] *= fade[m];
        KVC_UNROLL
        for (int i = 0; i < kDim / 2; i++) run.o[i / 4][i % 4] *= fade[i % 4 / 2];
      }
      const int lane = renewed(thread_lane());
      KVC_UNROLL
      for (int j = 0; j < S::kBlocks; j++) {
        const int block = (S::mine() + j * S::kSlotWarps) * 16;
        uint32_t p[4];
        KVC_UNROLL
        for (int i = 0; i < 2; i++) {
          const float4 v = *reinterpret_cast<const float4*>(&shared.value[parity][block + 8 * i + 2 * (lane & 3)]);
          KVC_UNROLL
          for (int m = 0; m < 2; m++) {
            const float p0 = fast_exp2(c[j][i][2 * m] - high[m]), p1 = fast_exp2(c[j][i][2 * m + 1] - high[m]);
            run.sum[m] += p0 * v.x;
            run.sum[m] += p1 * v.z;
            run.offset[m] += p0 * v.y;
            run.offset[m] += p1 * v.w;
            p[2 * i + m] = kBfloat && native ? pack_bfloats(p0, p1) : pack_halves(p0, p1);
          }
        }
        if (!a.out) continue;
        const uint4* values = shared.tile[1] + block * (kDim / 8);
        if (kBfloat && native) add_values<kDim, true>(run, p, values, lane);
        else add_values<kDim, false>(run, p, values, lane);
      }
      if (left > 1) {
        sections.template spread<S::kBrought>(words, own_keys, next_section, true);
        if (thread_lane() < S::kBrought) {
          const int slot = own + thread_lane();
          const SlotParams p = sections.params(next_section, raw, factor, next + slot < shared.length[next_section]);
          shared.key[!parity][slot] = p.key, shared.value[!parity][slot] = p.value;
        }
      }
      section = next_section, first = next, parity = !parity;
    }
    join_warps<kDim, kRowWarps>(run, shared, a.out);

    span = shared.span;
    if (span.from == span.begin && span.until == span.end) {
      finish<kDim, kBfloat, kRowWarps>(a, first_row, b, h, shared);
    } else {
      // Of the items a thread block works on, only its first and its last are shared with others.
      const int m = renewed(threadIdx.x);
      const int64_t slot = 2 * me + (span.begin > span.parts.begin(me));
      for (int i = m; a.out && i < S::kRows * kDim; i += kThreads) {
        w.partial[slot * S::kRows * kDim + i] = shared.out()[i / kDim][i % kDim];
      }
      if (m < S::kRows) {
        w.partial_max[slot * S::kRows + m] = shared.top()[m / 16][m % 16];
        w.partial_sum[slot * S::kRows + m] = shared.sum()[m / 16][m % 16];
      }
      const int first_part = span.parts.of(span.begin), last_part = span.parts.of(span.end - 1);
      __syncthreads();
      if (m == 0) shared.last = add_in_order(&w.arrived[span.item], 1) == last_part - first_part;
      __syncthreads();
      if (shared.last) {
        if (m < S::kRows) {
          float top = kLowest, sum = 0.f;
          for (int p = first_part; p <= last_part; p++) {
            const float other = w.partial_max[(2 * p + (span.begin > span.parts.begin(p))) * S::kRows + m];
            top = other > top ? other : top;
          }
          for (int p = first_part; p <= last_part; p++) {
            const int at = (2 * p + (span.begin > span.parts.begin(p))) * S::kRows + m;
            sum += w.partial_sum[at] * fast_exp2(w.partial_max[at] - top);
          }
          shared.top()[m / 16][m % 16] = top, shared.sum()[m / 16][m % 16] = sum;
        }
        __syncthreads();
        for (int i = m; a.out && i < S::kRows * kDim; i += kThreads) {
          const int r = i / kDim;
          float x = 0.f;
          for (int p = first_part; p <= last_part; p++) {
            const int64_t at = (2 * p + (span.begin > span.parts.begin(p))) * S::kRows;
            x += w.partial[at * kDim + i] * fast_exp2(w.partial_max[at + r] - shared.top()[r / 16][r % 16]);
          }
          shared.out()[r][i % kDim] = x;
        }
        __syncthreads();
        finish<kDim, kBfloat, kRowWarps>(a, first_row, b, h, shared);
      }
    }
    span.item++, span.begin = span.end, span.from = span.until;
  }
}

}  // namespace

#define KVC_JOIN_(a, b, c, d, e) a##b##c##d##e
#define KVC_JOIN(a, b, c, d, e) KVC_JOIN_(a, b, c, d, e)
// Shared memory is declared here: g++ forgets the section of the shim's in a template.
#define KVC_CHUNK(bfloat, type, rows)                                                                   \
  KVC_KERNEL __launch_bounds__(kThreads, KVC_HEAD_DIM * rows <= 2048 ? 3 : 2)                            \
  KVC_JOIN(kvc_chunk_, KVC_HEAD_DIM, _, rows, type)                                                     \
  (KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcChunk a, const uint8_t* key_valid,                  \
   KVC_PARAMETER KvcPartials w) {                                                                       \
    __shared__ Shared<KVC_HEAD_DIM, rows / 16> shared;                                                  \
    chunk<KVC_HEAD_DIM, bfloat, rows / 16>(layout, a, key_valid, w, shared);                            \
  }
#if KVC_HEAD_DIM <= 128
KVC_CHUNK(false, _f16, 64)
KVC_CHUNK(true, _bf16, 64)
KVC_CHUNK(false, _f16, 16)
KVC_CHUNK(true, _bf16, 16)
#endif
KVC_CHUNK(false, _f16, 32)
KVC_CHUNK(true, _bf16, 32)
#undef KVC_CHUNK
#undef KVC_JOIN
#undef KVC_JOIN_
