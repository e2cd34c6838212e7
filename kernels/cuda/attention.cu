// Attention of any number of queries for every head_dim and dtype, on CUDA cores in float32: chunk_attention and
// window_scores, the statistics of a decoding step, and the decoding of shapes that decode.cu does not take.
//
// A block of threads owns 16 query rows (or 16 slots, where scores are summed) and goes over the packed tiers, the
// tail and the new tokens, 16 slots at a time, through shared memory.
#include "pages.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;                       // query rows handled together
constexpr int kPitch = KVC_MAX_HEAD_DIM + 1;    // of a query or slot in shared memory: rows begin in different banks
constexpr int kTail = KVC_MAX_TIERS, kFresh = KVC_MAX_TIERS + 1;  // sections after the tiers
constexpr float kLowest = -1e30f;
constexpr int kLargest = 4;                     // in KvcScores::powers

struct Keys {  // everything a query may meet; pointers of the arguments, whichever operation they came with
  const KvcLayout& layout;
  const KvcRows& rows;
  const KvcTail& tail;
  const void *k, *v;  // new tokens
  int64_t k_b, k_h, k_t, v_b, v_h, v_t;
  int n_k, key_position, position_field;
  int b, h;
  int64_t row;

  KVC_DEVICE_METHOD int length(int section) const {
    if (section == kFresh) return n_k;
    if (section == kTail) return tail.capacity ? tail.length[b] : 0;
    return section < layout.n_tiers ? rows.length[section][row] : 0;
  }
  KVC_DEVICE_METHOD bool rotated(int section) const {
    return section < layout.n_tiers && layout.tier[section].rotate_keys;
  }
  // Logical position of a slot; a section without positions is always old enough and never too old.
  KVC_DEVICE_METHOD bool position(int section, int slot, int& at) const {
    if (section == kFresh) return at = key_position + slot, true;
    if (section == kTail) return at = tail.position[b * tail.capacity + slot], true;
    if (position_field < 0) return false;
    const KvcTier& tier = layout.tier[section];
    uint8_t* page = page_of(layout, rows, section, row, slot);
    at = static_cast<int>(*field_of(tier, page, position_field, slot % tier.slots));
    return true;
  }
  // Keys or values of slots first .. first + n as floats, to[slot][dim]; zero for the rest of the 16.
  KVC_DEVICE_METHOD void load(float (*to)[kPitch], int section, int first, int n, bool key) const {
    const int head_dim = layout.head_dim;
    for (int i = threadIdx.x; i < kBlock * head_dim; i += blockDim.x) {
      const int s = i / head_dim, d = i % head_dim, slot = first + s;
      float x = 0;
      if (s < n) {
        if (section == kFresh) {
          x = key ? load_element(k, b * k_b + h * k_h + slot * k_t + d, layout.dtype)
                  : load_element(v, b * v_b + h * v_h + slot * v_t + d, layout.dtype);
        } else if (section == kTail) {
          x = load_element(key ? tail.k : tail.v, (row * tail.capacity + slot) * head_dim + d, layout.dtype);
        } else {
          const KvcTier& tier = layout.tier[section];
          const Half half = half_of(layout, tier, page_of(layout, rows, section, row, slot), slot % tier.slots, key);
          const float scale = half.bits ? half_to_float(*half.scale) : 0.f;
          x = read_element(layout, half, d, scale, half.bits ? half_to_float(*half.offset) : 0.f);
        }
      }
      to[s][d] = x;
    }
  }
};

KVC_DEVICE float capped(float logit, float softcap) { return softcap > 0 ? softcap * tanhf(logit / softcap) : logit; }

// The sum of two numbers, or the larger one.
KVC_DEVICE float joined(float a, float b, bool largest) { return !largest ? a + b : b > a ? b : a; }

KVC_DEVICE float dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int d = 0; d < n; d++) sum += a[d] * b[d];
  return sum;
}

// Rotates the rows of q[kRows][head_dim], one warp to a row.
KVC_DEVICE void rotate_rows(float (*q)[kPitch], const KvcLayout& layout) {
  for (int m = thread_warp(); m < kRows; m += kThreads / 32) {
    rotate(q[m], layout.head_dim, layout.rotation_block);
  }
}

}  // namespace

// Grid: batch x kv_heads x tiles of 16 rows; row m of a KV head is query m / group, query head m % group of the group.
// Without `out` only the log-sum-exp is computed. key_valid: [batch, n_k], 0 = a new key that nobody sees; or null.
KVC_KERNEL __launch_bounds__(kThreads, 1)
kvc_chunk(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcChunk a, const uint8_t* key_valid, const int32_t* clock) {
  __shared__ float q[kRows][kPitch];
  __shared__ float tile[kBlock][kPitch];
  __shared__ float p[kRows][kBlock + 1];
  const int tiles = (a.n_q * a.group + kRows - 1) / kRows;
  const int row = blockIdx.x / tiles, first_row = blockIdx.x % tiles * kRows;
  const int b = row / a.kv_heads, h = row % a.kv_heads;
  const Keys keys{layout, a.rows, a.tail, a.k, a.v, a.k_b, a.k_h, a.k_t, a.v_b, a.v_h, a.v_t,
                  a.n_k, a.key_position, a.position_field, b, h, row};
  const int head_dim = layout.head_dim;
  for (int i = threadIdx.x; i < kRows * head_dim; i += kThreads) {
    const int m = i / head_dim, d = i % head_dim, query = (first_row + m) / a.group;
    const int64_t head = static_cast<int64_t>(h) * a.group + (first_row + m) % a.group;
    q[m][d] = query < a.n_q ? load_element(a.q, b * a.q_b + head * a.q_h + query * a.q_t + d, layout.dtype) : 0.f;
  }
  __syncthreads();

  // Eight threads to a row: each has two of 16 slots, and every eighth dimension of the output.
  const int m = threadIdx.x / 8, part = threadIdx.x % 8;
  const int query = (first_row + m) / a.group;
  const bool active = query < a.n_q;
  const int at = position_at(clock, a.position) + query;
  float top = kLowest, sum = 0.f;
  float out[KVC_MAX_HEAD_DIM / 8];
  KVC_UNROLL
  for (int i = 0; i < KVC_MAX_HEAD_DIM / 8; i++) out[i] = 0.f;
  const int evicted = a.rows.evicted_counts ? a.rows.evicted_counts[row] : 0;
  if (evicted > 0) {  // as one slot, that comes first
    const int64_t mean = static_cast<int64_t>(row) * 2 * head_dim;
    float x = 0.f;
    for (int d = part; d < head_dim; d += 8) x += q[m][d] * load_element(a.rows.evicted_means, mean + d, layout.dtype);
    for (int step = 4; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    top = capped(x * a.scale, a.softcap) + logf(static_cast<float>(evicted));
    sum = part == 0 ? 1.f : 0.f;
    KVC_UNROLL
    for (int i = 0; i < KVC_MAX_HEAD_DIM / 8; i++) {
      const int d = part + 8 * i;
      if (d < head_dim) out[i] = load_element(a.rows.evicted_means, mean + head_dim + d, layout.dtype);
    }
    __syncthreads();  // queries are turned in place
  }
  bool rotated = false;
  for (int section = 0; section <= kFresh; section++) {
    const int length = keys.length(section);
    if (length == 0) continue;
    if (keys.rotated(section) != rotated) {  // the transform is its own inverse
      rotated = !rotated;
      rotate_rows(q, layout);
      __syncthreads();
    }
    for (int first = 0; first < length; first += kBlock) {
      const int n = least(kBlock, length - first);
      keys.load(tile, section, first, n, true);
      __syncthreads();
      float logit[2];
      KVC_UNROLL
      for (int i = 0; i < 2; i++) {
        const int s = part + 8 * i, slot = first + s;
        bool seen = active && s < n;
        if (seen) {
          int position = 0;
          const bool placed = (section == kFresh || a.window > 0) && keys.position(section, slot, position);
          if (a.window > 0 && placed) seen = at - position < a.window;
          if (section == kFresh) {
            const int64_t pair = (static_cast<int64_t>(b) * a.n_q + query) * a.n_k + slot;
            seen = seen && (a.allowed ? a.allowed[pair] != 0 : position <= at);
            if (key_valid && !key_valid[static_cast<int64_t>(b) * a.n_k + slot]) seen = false;
          }
        }
        float x = capped(dot(q[m], tile[s], head_dim) * a.scale, a.softcap);
        if (seen && section == kFresh && a.bias) x += a.bias[(static_cast<int64_t>(b) * a.n_q + query) * a.n_k + slot];
        logit[i] = seen ? x : -infinity();
      }
      float high = logit[0] > logit[1] ? logit[0] : logit[1];
      for (int step = 4; step; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, high, step);
        high = other > high ? other : high;
      }
      high = high > top ? high : top;
      const float fade = expf(top - high);
      top = high;
      const float p0 = expf(logit[0] - top), p1 = expf(logit[1] - top);
      sum = sum * fade + p0 + p1;
      if (!a.out) {
        __syncthreads();  // the tile is done with
        continue;
      }
      p[m][part] = p0, p[m][part + 8] = p1;
      __syncthreads();
      keys.load(tile, section, first, n, false);
      __syncthreads();
      KVC_UNROLL
      for (int i = 0; i < KVC_MAX_HEAD_DIM / 8; i++) {
        const int d = part + 8 * i;
        if (d < head_dim) {
          float x = out[i] * fade;
          for (int s = 0; s < kBlock; s++) x += p[m][s] * tile[s][d];
          out[i] = x;
        }
      }
      __syncthreads();
    }
  }
  for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (!active) return;
  const int64_t head = static_cast<int64_t>(h) * a.group + (first_row + m) % a.group;
  if (a.sinks) {
    const float sink = a.sinks[head], high = sink > top ? sink : top, fade = expf(top - high);
    sum = sum * fade + expf(sink - high);
    top = high;
    KVC_UNROLL
    for (int i = 0; i < KVC_MAX_HEAD_DIM / 8; i++) out[i] *= fade;
  }
  const float norm = sum > 0.f ? 1.f / sum : 0.f;
  if (a.out) {
    KVC_UNROLL
    for (int i = 0; i < KVC_MAX_HEAD_DIM / 8; i++) {
      const int d = part + 8 * i;
      if (d < head_dim) store_element(a.out, b * a.out_b + query * a.out_t + head * a.out_h + d, layout.dtype, out[i] * norm);
    }
  }
  if (a.lse && part == 0) {
    const int64_t heads = static_cast<int64_t>(a.kv_heads) * a.group;
    a.lse[(b * heads + head) * a.n_q + query] = sum > 0.f ? top + logf(sum) : -infinity();
  }
}

// Adds up probabilities and their squares over the queries, or takes the largest, given their log-sum-exp. Grid:
// batch x kv_heads x tiles of 16 slots, `tiles` of them: those of each tier, then the tail's, then the new tokens'.
KVC_KERNEL __launch_bounds__(kThreads, 1)
kvc_scores(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcScores a, const float* lse, int32_t tiles) {
  __shared__ float q[kRows][kPitch];
  __shared__ float tile[kBlock][kPitch];
  __shared__ float sums[2][kRows][kBlock + 1];
  const int row = blockIdx.x / tiles, b = row / a.kv_heads, h = row % a.kv_heads;
  const Keys keys{layout, a.rows, a.tail, a.k, nullptr, a.k_b, a.k_h, a.k_t, 0, 0, 0,
                  a.n_k, a.key_position, a.position_field, b, h, row};
  int index = blockIdx.x % tiles, section = 0;
  for (; section < kFresh; section++) {
    const int64_t width = section == kTail ? a.tail.capacity : section < layout.n_tiers ? a.past_stride[section] : 0;
    const int here = static_cast<int>((width + kBlock - 1) / kBlock);
    if (index < here) break;
    index -= here;
  }
  const int first = index * kBlock, head_dim = layout.head_dim;
  const int n = least(kBlock, keys.length(section) - first);
  if (n <= 0) return;  // the whole block: outputs are zero already
  keys.load(tile, section, first, n, true);
  // Eight threads to a query, two slots each.
  const int m = threadIdx.x / 8, part = threadIdx.x % 8;
  int position[2] = {0, 0};
  bool placed[2], usable[2];
  KVC_UNROLL
  for (int i = 0; i < 2; i++) {
    const int s = part + 8 * i, slot = first + s;
    usable[i] = s < n;
    placed[i] = usable[i] && keys.position(section, slot, position[i]);
    if (section == kFresh && a.key_valid && usable[i]) {
      usable[i] = a.key_valid[static_cast<int64_t>(b) * a.n_k + slot] != 0;
    }
  }
  const bool largest = a.powers & kLargest;
  const int64_t heads = static_cast<int64_t>(a.kv_heads) * a.group;
  for (int g = 0; g < a.group; g++) {
    const int64_t head = static_cast<int64_t>(h) * a.group + g;
    float total[2][2] = {{0.f, 0.f}, {0.f, 0.f}};  // of probabilities (or the largest) and of squares, for each slot
    for (int start = 0; start < a.n_q; start += kRows) {
      __syncthreads();  // the queries before are done with
      for (int i = threadIdx.x; i < kRows * head_dim; i += kThreads) {
        const int query = start + i / head_dim, d = i % head_dim;
        q[i / head_dim][d] =
            query < a.n_q ? load_element(a.q, b * a.q_b + head * a.q_h + query * a.q_t + d, layout.dtype) : 0.f;
      }
      __syncthreads();
      if (keys.rotated(section)) {
        rotate_rows(q, layout);
        __syncthreads();
      }
      const int query = start + m, at = a.position + query;
      if (query >= a.n_q || (a.query_valid && !a.query_valid[static_cast<int64_t>(b) * a.n_q + query])) continue;
      const float norm = lse[(b * heads + head) * a.n_q + query];
      KVC_UNROLL
      for (int i = 0; i < 2; i++) {
        bool counts = usable[i];
        if (section == kFresh) counts = counts && position[i] <= at;
        if (placed[i] && a.window > 0) counts = counts && at - position[i] < a.window;
        if (placed[i] && a.exclude > 0) counts = counts && at - position[i] >= a.exclude;
        if (!counts) continue;
        const float x = capped(dot(q[m], tile[part + 8 * i], head_dim) * a.scale, a.softcap);
        const float probability = expf(x - norm);
        total[0][i] = joined(total[0][i], probability, largest);
        total[1][i] += probability * probability;
      }
    }
    KVC_UNROLL
    for (int power = 0; power < 2; power++) sums[power][m][part] = total[power][0], sums[power][m][part + 8] = total[power][1];
    __syncthreads();
    const int power = threadIdx.x / kBlock, s = threadIdx.x % kBlock;
    if (power < 2 && s < n && (a.powers >> power & 1)) {
      float sum = 0;
      for (int i = 0; i < kRows; i++) sum = joined(sum, sums[power][i][s], largest);
      const KvcSums& to = power ? a.square : a.sum;
      const int64_t at = b * heads + head, slot = first + s;
      if (section == kFresh) to.fresh[at * a.n_k + slot] = sum;
      else if (section == kTail) to.tail[at * a.tail.capacity + slot] = sum;
      else to.past[section][at * a.past_stride[section] + slot] = sum;
    }
  }
}

// After a decoding step: adds each slot's probability (and its square), summed over the group, to slot fields. Grid as
// in kvc_scores, with `width[t]` slots of tier t.
KVC_KERNEL __launch_bounds__(kThreads, 1)
kvc_statistics(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcDecode a, const float* lse, KVC_PARAMETER KvcWidths w,
               const int32_t* clock) {
  __shared__ float q[kRows][kPitch];
  __shared__ float tile[kBlock][kPitch];
  __shared__ float p[kRows][kBlock + 1];
  const int row = blockIdx.x / w.tiles, b = row / a.kv_heads, h = row % a.kv_heads;
  if (a.valid && !a.valid[b]) return;
  const Keys keys{layout, a.rows, a.tail, nullptr, nullptr, 0, 0, 0, 0, 0, 0, 0, 0, a.position_field, b, h, row};
  int index = blockIdx.x % w.tiles, section = 0;
  for (; section < kTail; section++) {
    const int here = (w.width[section] + kBlock - 1) / kBlock;
    if (index < here) break;
    index -= here;
  }
  const int first = index * kBlock, head_dim = layout.head_dim;
  const int n = least(kBlock, keys.length(section) - first);
  if (n <= 0) return;
  keys.load(tile, section, first, n, true);
  const int m = threadIdx.x / 8, part = threadIdx.x % 8;
  const int64_t heads = static_cast<int64_t>(a.kv_heads) * a.group;
  const int now = position_at(clock, a.position);
  float sum = 0.f, square = 0.f;
  for (int start = 0; start < a.group; start += kRows) {
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * head_dim; i += kThreads) {
      const int64_t head = static_cast<int64_t>(h) * a.group + start + i / head_dim;
      const bool there = start + i / head_dim < a.group;
      q[i / head_dim][i % head_dim] =
          there ? load_element(a.q, b * a.q_b + head * a.q_h + i % head_dim, layout.dtype) : 0.f;
    }
    __syncthreads();
    if (keys.rotated(section)) {
      rotate_rows(q, layout);
      __syncthreads();
    }
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      const int s = part + 8 * i;
      int position = 0;
      bool seen = start + m < a.group && s < n;
      if (seen && a.window > 0 && keys.position(section, first + s, position)) seen = now - position < a.window;
      const float x = capped(dot(q[m], tile[s], head_dim) * a.scale, a.softcap);
      p[m][s] = seen ? expf(x - lse[b * heads + static_cast<int64_t>(h) * a.group + start + m]) : 0.f;
    }
    __syncthreads();
    if (threadIdx.x < n) {
      for (int i = 0; i < kRows; i++) sum += p[i][threadIdx.x], square += p[i][threadIdx.x] * p[i][threadIdx.x];
    }
  }
  if (threadIdx.x >= n) return;
  const int slot = first + threadIdx.x;
  for (int i = 0; i < 2; i++) {
    const int field = i ? a.square_field : a.sum_field;
    if (field < 0) continue;
    float* to;
    if (section == kTail) {
      const int64_t rows = static_cast<int64_t>(a.batch) * a.kv_heads;
      to = static_cast<float*>(a.tail.fields) + (field * rows + row) * a.tail.capacity + slot;
    } else {
      const KvcTier& tier = layout.tier[section];
      uint8_t* page = page_of(layout, a.rows, section, row, slot);
      to = reinterpret_cast<float*>(field_of(tier, page, field, slot % tier.slots));
    }
    *to += i ? square : sum;
  }
}
