// Storing and moving slots: append, pack, move, retier, fields, dense, slot sums, hadamard. One warp works on one slot; in
// canonical order no two slots share a byte, so no order among warps matters. Compiled without fusing multiply and add: the
// codes must be those of quantize.py, bit for bit.
#include "pages.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kSummed = 256;  // slots that a thread block looks at to sum some of them up
constexpr float kHalfMax = 65504.f;
constexpr float kTwoBitKeys = 0.85f, kTwoBitValues = 0.8f, kTwoBitSearch = 0.9375f;  // quantize.py

struct Scratch {  // of one warp
  float x[KVC_MAX_HEAD_DIM];
  uint8_t codes[KVC_MAX_HEAD_DIM];
};

KVC_DEVICE float clamped(float x, float low) {  // NaN becomes 0
  if (!(x == x)) return 0.f;
  return x < low ? low : x > kHalfMax ? kHalfMax : x;
}

// The nearest code, half to even.
KVC_DEVICE float code_of(float x, float zero, float step, float top) {
  float t = (x - zero) / step;
  t = step > 0.f && t > 0.f ? t : 0.f;  // NaN too
  return rintf(t < top ? t : top);
}

// Codes of a key, one channel after the other, each making good the errors of those before it: every lane does all of
// it, as none can go ahead.
KVC_DEVICE void codes_in_turn(int head_dim, const uint16_t* feedback, float zero, float step, float top,
                              Scratch& scratch) {
  float collected[KVC_FEEDBACK_RANK] = {};
  for (int d = 0; d < head_dim; d++) {
    float made_good = 0.f;
    for (int r = 0; r < KVC_FEEDBACK_RANK; r++) {
      const float part = bfloat_to_float(feedback[r * head_dim + d]) * collected[r];
      made_good = r ? made_good + part : part;
    }
    const float x = scratch.x[d];
    const float code = code_of(x - made_good, zero, step, top);
    if (thread_lane() == 0) scratch.codes[d] = static_cast<uint8_t>(code);
    float error = code * step + zero - x;
    if (!(fabsf(error) <= kHalfMax)) error = 0.f;  // of an infinity nothing can be made good
    for (int r = 0; r < KVC_FEEDBACK_RANK; r++) {
      collected[r] = collected[r] + bfloat_to_float(feedback[(KVC_FEEDBACK_RANK + r) * head_dim + d]) * error;
    }
  }
}

// Quantises scratch.x into a slot, with feedback where there is any; true in every lane when the range did not fit.
KVC_DEVICE bool store_codes(int head_dim, const Half& to, const uint16_t* feedback, Scratch& scratch) {
  const int lane = thread_lane();
  float low = infinity(), high = -infinity();
  uint32_t nan = 0;
  for (int d = lane; d < head_dim; d += 32) {
    float x = scratch.x[d];
    if (!(x == x)) nan = 1, x = 0.f, scratch.x[d] = 0.f;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  for (int step = 16; step; step /= 2) {
    const float l = __shfl_xor_sync(kAllLanes, low, step), h = __shfl_xor_sync(kAllLanes, high, step);
    low = l < low ? l : low;
    high = h > high ? h : high;
    nan |= __shfl_xor_sync(kAllLanes, nan, step);
  }
  if (to.bits == 2) {
    const float centre = low * 0.5f + high * 0.5f;
    const float half = (high * 0.5f - low * 0.5f) * (to.key ? kTwoBitKeys : kTwoBitValues);
    low = centre - half;
    high = centre + half;
  }
  const float top = static_cast<float>((1 << to.bits) - 1);
  const float width = (high - low) / top;
  const bool overflow = !(fabsf(low) <= kHalfMax && fabsf(high) <= kHalfMax && width <= kHalfMax);
  const uint16_t scale = float_to_half(clamped(width, 0.f));
  const uint16_t offset = float_to_half(clamped(low, -kHalfMax) + 0.f);  // + 0: no negative zero
  float step = half_to_float(scale), zero = half_to_float(offset);
  if (to.bits == 2 && !to.key) {  // about the same centre, 1.5 steps from either end
    zero = zero + step * (1.5f * (1.f - kTwoBitSearch));
    step = step * kTwoBitSearch;
  }
  if (lane == 0) *to.scale = scale, *to.offset = offset;
  __syncwarp();
  if (feedback) {
    codes_in_turn(head_dim, feedback, zero, step, top, scratch);
  } else {
    for (int d = lane; d < head_dim; d += 32) {
      scratch.codes[d] = static_cast<uint8_t>(code_of(scratch.x[d], zero, step, top));
    }
  }
  __syncwarp();
  const int per_byte = 8 / to.bits;
  for (int i = lane; i < to.bytes; i += 32) {
    uint32_t byte = 0;
    for (int j = 0; j < per_byte; j++) byte |= static_cast<uint32_t>(scratch.codes[i * per_byte + j]) << (j * to.bits);
    to.row[i] = static_cast<uint8_t>(byte);
  }
  __syncwarp();
  return overflow || nan;
}

// The feedback of a row for keys of a tier, or null.
KVC_DEVICE const uint16_t* feedback_of(const KvcLayout& layout, const KvcRows& rows, const KvcTier& tier, int64_t row) {
  if (!rows.key_feedback || !tier.rotate_keys) return nullptr;
  return rows.key_feedback + row * 2 * KVC_FEEDBACK_RANK * layout.head_dim;
}

// scratch.x -> keys or values of a slot, rotated first where asked.
KVC_DEVICE bool store_half(const KvcLayout& layout, const Half& to, bool turn, const uint16_t* feedback,
                           Scratch& scratch) {
  if (turn) rotate(scratch.x, layout.head_dim, layout.rotation_block);
  if (to.bits) return store_codes(layout.head_dim, to, feedback, scratch);
  for (int d = thread_lane(); d < layout.head_dim; d += 32) store_element(to.row, d, layout.dtype, scratch.x[d]);
  __syncwarp();
  return false;
}

KVC_DEVICE void read_half(const KvcLayout& layout, const Half& of, bool turn, Scratch& scratch) {
  const float scale = of.bits ? half_to_float(*of.scale) : 0.f, offset = of.bits ? half_to_float(*of.offset) : 0.f;
  for (int d = thread_lane(); d < layout.head_dim; d += 32) scratch.x[d] = read_element(layout, of, d, scale, offset);
  __syncwarp();
  if (turn) rotate(scratch.x, layout.head_dim, layout.rotation_block);
}

KVC_DEVICE void copy_words(void* to, const void* from, int bytes, int me, int count) {
  uint32_t* t = static_cast<uint32_t*>(to);
  const uint32_t* f = static_cast<const uint32_t*>(from);
  for (int i = me; i < bytes / 4; i += count) t[i] = f[i];
}

// Native elements from `from`[at ..]; sources may lie at odd addresses.
KVC_DEVICE void copy_elements(void* to, const void* from, int64_t at, int n, int bytes, int me, int count) {
  for (int i = me; i < n; i += count) {
    if (bytes == 4) static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[at + i];
    else static_cast<uint16_t*>(to)[i] = static_cast<const uint16_t*>(from)[at + i];
  }
}

}  // namespace

// Grid: rows x slots / kWarps; `slots` is the most that any row gets.
KVC_KERNEL __launch_bounds__(kWarps * 32, 1)
kvc_pack(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcPack a, int32_t slots, int32_t* overflow) {
  __shared__ Scratch scratches[kWarps];
  Scratch& scratch = scratches[thread_warp()];
  const int lane = thread_lane();
  const int per_row = (slots + kWarps - 1) / kWarps;
  const int row = blockIdx.x / per_row, i = blockIdx.x % per_row * kWarps + thread_warp();
  const int b = row / a.kv_heads, h = row % a.kv_heads;
  if (i >= a.count[b * a.count_b + h * a.count_h]) return;
  const int token = a.index ? a.index[b * a.index_b + h * a.index_h + i] : i;
  const int slot = a.rows.length[a.tier][row] + i;
  const KvcTier& tier = layout.tier[a.tier];
  uint8_t* page = page_of(layout, a.rows, a.tier, row, slot);
  const int inside = slot % tier.slots;
  bool clamped_here = false;
  for (int part = 0; part < 2; part++) {
    const bool key = part == 0;
    const void* from = key ? a.k : a.v;
    const int64_t at = key ? b * a.k_b + h * a.k_h + token * a.k_t : b * a.v_b + h * a.v_h + token * a.v_t;
    const Half to = half_of(layout, tier, page, inside, key);
    if (!to.bits) {
      copy_elements(to.row, from, at, layout.head_dim, element_bytes(layout.dtype), lane, 32);
      continue;
    }
    for (int d = lane; d < layout.head_dim; d += 32) scratch.x[d] = load_element(from, at + d, layout.dtype);
    __syncwarp();
    const uint16_t* feedback = key ? feedback_of(layout, a.rows, tier, row) : nullptr;
    clamped_here |= store_half(layout, to, key && tier.rotate_keys, feedback, scratch);
  }
  if (lane < a.n_fields) {
    const int32_t* values = a.field[lane];
    *field_of(tier, page, lane, inside) = values[b * a.field_b[lane] + h * a.field_h[lane] + token];
  }
  if (clamped_here && lane == 0) atomicAdd(overflow, 1);
}

KVC_KERNEL __launch_bounds__(kWarps * 32, 1) kvc_move(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcMove a) {
  const int i = blockIdx.x * kWarps + thread_warp(), lane = thread_lane();
  if (i >= a.n) return;
  const KvcTier& tier = layout.tier[a.tier];
  uint8_t* to_page = page_of(layout, a.rows, a.tier, a.row[i], a.dst[i]);
  uint8_t* of_page = page_of(layout, a.rows, a.tier, a.row[i], a.src[i]);
  const int dst = a.dst[i] % tier.slots, src = a.src[i] % tier.slots;
  for (int part = 0; part < 2; part++) {
    const Half to = half_of(layout, tier, to_page, dst, part == 0), of = half_of(layout, tier, of_page, src, part == 0);
    copy_words(to.row, of.row, to.bytes, lane, 32);
    if (to.bits && lane == 0) *to.scale = *of.scale, *to.offset = *of.offset;
  }
  if (lane < layout.n_fields) *field_of(tier, to_page, lane, dst) = *field_of(tier, of_page, lane, src);
}

KVC_KERNEL __launch_bounds__(kWarps * 32, 1)
kvc_retier(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcRetier a, int32_t* overflow) {
  __shared__ Scratch scratches[kWarps];
  Scratch& scratch = scratches[thread_warp()];
  const int i = blockIdx.x * kWarps + thread_warp(), lane = thread_lane();
  if (i >= a.n) return;
  const KvcTier &to_tier = layout.tier[a.dst_tier], &of_tier = layout.tier[a.src_tier];
  uint8_t* to_page = page_of(layout, a.rows, a.dst_tier, a.row[i], a.dst[i]);
  uint8_t* of_page = page_of(layout, a.rows, a.src_tier, a.row[i], a.src[i]);
  const int dst = a.dst[i] % to_tier.slots, src = a.src[i] % of_tier.slots;
  bool clamped_here = false;
  for (int part = 0; part < 2; part++) {
    const bool key = part == 0;
    read_half(layout, half_of(layout, of_tier, of_page, src, key), false, scratch);
    // The transform is its own inverse.
    const bool turn = key && of_tier.rotate_keys != to_tier.rotate_keys;
    const uint16_t* feedback = key ? feedback_of(layout, a.rows, to_tier, a.row[i]) : nullptr;
    clamped_here |= store_half(layout, half_of(layout, to_tier, to_page, dst, key), turn, feedback, scratch);
  }
  if (lane < layout.n_fields) *field_of(to_tier, to_page, lane, dst) = *field_of(of_tier, of_page, lane, src);
  if (clamped_here && lane == 0) atomicAdd(overflow, 1);
}

// One thread per value; grid: rows x values / block.
KVC_KERNEL __launch_bounds__(kWarps * 32, 1) kvc_fields(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcFields a) {
  const int per_row = static_cast<int>((a.stride + blockDim.x - 1) / blockDim.x);
  const int64_t row = blockIdx.x / per_row;
  const int slot = blockIdx.x % per_row * blockDim.x + threadIdx.x;
  if (slot >= a.stride || slot >= a.rows.length[a.tier][row]) return;
  const KvcTier& tier = layout.tier[a.tier];
  uint32_t* field = field_of(tier, page_of(layout, a.rows, a.tier, row, slot), a.field, slot % tier.slots);
  uint32_t* value = static_cast<uint32_t*>(a.values) + row * a.stride + slot;
  if (a.write) *field = *value;
  else *value = *field;
}

// Grid: rows x slots / kWarps.
KVC_KERNEL __launch_bounds__(kWarps * 32, 1) kvc_dense(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcDense a) {
  __shared__ Scratch scratches[kWarps];
  Scratch& scratch = scratches[thread_warp()];
  const int per_row = static_cast<int>((a.stride + kWarps - 1) / kWarps);
  const int64_t row = blockIdx.x / per_row;
  const int slot = blockIdx.x % per_row * kWarps + thread_warp();
  if (slot >= a.stride || slot >= a.rows.length[a.tier][row]) return;
  const KvcTier& tier = layout.tier[a.tier];
  uint8_t* page = page_of(layout, a.rows, a.tier, row, slot);
  for (int part = 0; part < 2; part++) {
    const bool key = part == 0;
    read_half(layout, half_of(layout, tier, page, slot % tier.slots, key), key && tier.rotate_keys, scratch);
    float* to = (key ? a.k : a.v) + (row * a.stride + slot) * layout.head_dim;
    for (int d = thread_lane(); d < layout.head_dim; d += 32) to[d] = scratch.x[d];
    __syncwarp();
  }
}

// Sums over the chosen of kSummed slots each. Grid: rows x parts of kSummed; a.sums: [rows, parts, 2, D]. What all of
// them are rotated by, the sum is rotated by.
KVC_KERNEL __launch_bounds__(kWarps * 32, 1) kvc_slot_sums(KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcSlotSums a) {
  __shared__ float sums[2][kWarps][KVC_MAX_HEAD_DIM];
  const int warp = thread_warp(), lane = thread_lane();
  const int parts = static_cast<int>((a.stride + kSummed - 1) / kSummed);
  const int64_t row = blockIdx.x / parts;
  const int first = blockIdx.x % parts * kSummed;
  const int until = least(first + kSummed, least(a.rows.length[a.tier][row], static_cast<int>(a.stride)));
  const KvcTier& tier = layout.tier[a.tier];
  float total[2][KVC_MAX_HEAD_DIM / 32] = {};
  for (int slot = first + warp; slot < until; slot += kWarps) {
    if (!a.chosen[row * a.stride + slot]) continue;
    uint8_t* page = page_of(layout, a.rows, a.tier, row, slot);
    KVC_UNROLL
    for (int part = 0; part < 2; part++) {
      const Half of = half_of(layout, tier, page, slot % tier.slots, part == 0);
      const float scale = of.bits ? half_to_float(*of.scale) : 0.f, offset = of.bits ? half_to_float(*of.offset) : 0.f;
      KVC_UNROLL
      for (int i = 0; i < KVC_MAX_HEAD_DIM / 32; i++) {
        const int d = lane + 32 * i;
        if (d < layout.head_dim) total[part][i] += read_element(layout, of, d, scale, offset);
      }
    }
  }
  KVC_UNROLL
  for (int i = 0; i < 2 * KVC_MAX_HEAD_DIM / 32; i++) {
    sums[i % 2][warp][lane + i / 2 * 32] = total[i % 2][i / 2];
  }
  __syncthreads();
  if (warp > 1) return;
  float* sum = sums[warp][0];
  for (int d = lane; d < layout.head_dim; d += 32) {
    for (int other = 1; other < kWarps; other++) sum[d] += sums[warp][other][d];
  }
  __syncwarp();
  if (warp == 0 && tier.rotate_keys) rotate(sum, layout.head_dim, layout.rotation_block);
  float* to = a.sums + (2 * static_cast<int64_t>(blockIdx.x) + warp) * layout.head_dim;
  for (int d = lane; d < layout.head_dim; d += 32) to[d] = sum[d];
}

// Orthonormal Walsh-Hadamard transform of vectors, one warp each.
KVC_KERNEL __launch_bounds__(kWarps * 32, 1) kvc_hadamard(KVC_PARAMETER KvcHadamard a) {
  __shared__ Scratch scratches[kWarps];
  float* x = scratches[thread_warp()].x;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + thread_warp();
  if (i >= static_cast<int64_t>(a.batch) * a.outer * a.inner) return;
  const int64_t at = i / a.inner / a.outer * a.x_b + i / a.inner % a.outer * a.x_h + i % a.inner * a.x_t;
  for (int d = thread_lane(); d < a.head_dim; d += 32) x[d] = load_element(a.x, at + d, a.dtype);
  __syncwarp();
  rotate(x, a.head_dim, a.block);
  for (int d = thread_lane(); d < a.head_dim; d += 32) store_element(a.out, i * a.head_dim + d, a.dtype, x[d]);
}

// One block per new token of a sequence. Lengths stay as they are: other blocks read them; kvc_advance follows.
KVC_KERNEL __launch_bounds__(kWarps * 32, 1) kvc_append(KVC_PARAMETER KvcAppend a, const int32_t* clock) {
  __shared__ int before;
  const int b = blockIdx.x / a.n_k, t = blockIdx.x % a.n_k;
  const uint8_t* valid = a.valid ? a.valid + static_cast<int64_t>(b) * a.n_k : nullptr;
  if (valid && !valid[t]) return;
  if (threadIdx.x == 0) before = valid ? 0 : t;
  __syncthreads();
  if (valid) {
    int count = 0;
    for (int i = threadIdx.x; i < t; i += blockDim.x) count += valid[i] != 0;
    atomicAdd(&before, count);
    __syncthreads();
  }
  const int64_t slot = a.tail.length[b] + before;
  if (slot >= a.tail.capacity) return;  // the caller has checked; never write outside
  const int element = element_bytes(a.dtype);
  for (int h = 0; h < a.kv_heads; h++) {
    const int64_t row = static_cast<int64_t>(b) * a.kv_heads + h;
    const int64_t to = (row * a.tail.capacity + slot) * a.head_dim * element;
    const int64_t k = b * a.k_b + h * a.k_h + t * a.k_t, v = b * a.v_b + h * a.v_h + t * a.v_t;
    copy_elements(static_cast<uint8_t*>(a.tail.k) + to, a.k, k, a.head_dim, element, threadIdx.x, blockDim.x);
    copy_elements(static_cast<uint8_t*>(a.tail.v) + to, a.v, v, a.head_dim, element, threadIdx.x, blockDim.x);
  }
  const int64_t fields = a.tail.fields ? a.n_fields * a.kv_heads : 0;
  for (int64_t i = threadIdx.x; i < fields; i += blockDim.x) {
    const int64_t f = i / a.kv_heads, row = static_cast<int64_t>(b) * a.kv_heads + i % a.kv_heads;
    const int64_t rows = static_cast<int64_t>(a.batch) * a.kv_heads;
    static_cast<uint32_t*>(a.tail.fields)[(f * rows + row) * a.tail.capacity + slot] = 0;
  }
  if (threadIdx.x == 0) a.tail.position[b * a.tail.capacity + slot] = position_at(clock, a.position) + t;
}

// One warp per sequence: adds the number of its valid new tokens to its tail length, and all of them to the clock.
KVC_KERNEL __launch_bounds__(32) kvc_advance(KVC_PARAMETER KvcAppend a, int32_t* clock) {
  const int b = blockIdx.x, lane = thread_lane();
  int count = 0;
  for (int t = lane; t < a.n_k; t += 32) count += a.valid ? a.valid[static_cast<int64_t>(b) * a.n_k + t] != 0 : 1;
  for (int step = 16; step; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  if (lane == 0) {
    const int64_t length = a.tail.length[b] + static_cast<int64_t>(count);
    a.tail.length[b] = static_cast<int32_t>(length < a.tail.capacity ? length : a.tail.capacity);
    if (clock && b == 0) *clock += a.n_k;
  }
}
