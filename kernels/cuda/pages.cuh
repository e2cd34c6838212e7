// Where things are in a page, one slot at a time. On CUDA the inner order of a page is the canonical one
// (page_layout.h): a slot's codes lie in one row, which is what a tensor-core fragment wants once the head
// dimensions are permuted, and permuting those costs nothing where queries are permuted alike (decode.cu).
#ifndef KVC_PAGES_CUH
#define KVC_PAGES_CUH
#include "parameters.h"
#include "primitives.cuh"

constexpr int kBlock = KVC_SLOT_MULTIPLE;  // slots that are handled together
constexpr uint32_t kAllLanes = 0xffffffffu;

KVC_DEVICE uint8_t* page_address(const int64_t* slabs, int shift, int64_t page_bytes, int32_t id) {
  return reinterpret_cast<uint8_t*>(slabs[id >> shift]) + (id & ((1 << shift) - 1)) * page_bytes;
}

KVC_DEVICE uint8_t* page_of(const KvcLayout& layout, const KvcRows& rows, int tier, int64_t row, int slot) {
  const int32_t id = rows.table[tier][row * rows.table_stride[tier] + slot / layout.tier[tier].slots];
  return page_address(rows.slabs, rows.slab_shift, layout.page_bytes, id);
}

// A position of the arguments, see parameters.h.
KVC_DEVICE int position_at(const int32_t* clock, int position) { return clock ? *clock + position : position; }

KVC_DEVICE int element_bytes(int dtype) { return dtype == KVC_F32 ? 4 : 2; }

KVC_DEVICE float load_element(const void* base, int64_t index, int dtype) {
  if (dtype == KVC_F32) return static_cast<const float*>(base)[index];
  const uint16_t h = static_cast<const uint16_t*>(base)[index];
  return dtype == KVC_F16 ? half_to_float(h) : bfloat_to_float(h);
}

KVC_DEVICE void store_element(void* base, int64_t index, int dtype, float x) {
  if (dtype == KVC_F32) static_cast<float*>(base)[index] = x;
  else static_cast<uint16_t*>(base)[index] = dtype == KVC_F16 ? float_to_half(x) : float_to_bfloat(x);
}

struct Half {  // keys or values of one slot of a page
  uint8_t* row;              // codes, or native elements
  uint16_t *scale, *offset;  // null in the native tier
  int bits;                  // of a code; 0 = native
  int bytes;                 // of the row
  bool key;
};

KVC_DEVICE Half half_of(const KvcLayout& layout, const KvcTier& tier, uint8_t* page, int slot, bool key) {
  Half h;
  h.key = key;
  h.bits = key ? tier.key_bits : tier.value_bits;
  h.bytes = h.bits ? layout.head_dim * h.bits / 8 : layout.head_dim * element_bytes(layout.dtype);
  h.row = page + (key ? tier.keys : tier.values) + static_cast<int64_t>(slot) * h.bytes;
  uint16_t* params = reinterpret_cast<uint16_t*>(page + (key ? tier.key_params : tier.value_params));
  h.scale = h.bits ? params + slot : nullptr;
  h.offset = h.bits ? params + tier.slots + slot : nullptr;
  return h;
}

KVC_DEVICE uint32_t* field_of(const KvcTier& tier, uint8_t* page, int field, int slot) {
  return reinterpret_cast<uint32_t*>(page + tier.fields) + static_cast<int64_t>(field) * tier.slots + slot;
}

// Element d of a slot, dequantised. Multiply and add are not fused: quantize.py rounds twice.
KVC_DEVICE float read_element(const KvcLayout& layout, const Half& h, int d, float scale, float offset) {
  if (!h.bits) return load_element(h.row, d, layout.dtype);
  const int per_byte = 8 / h.bits;
  const uint32_t code = h.row[d / per_byte] >> (d % per_byte * h.bits) & ((1u << h.bits) - 1);
  return static_cast<float>(code) * scale + offset;
}

// Orthonormal Walsh-Hadamard transform of blocks of x[head_dim], by one warp: the additions of quantize.hadamard in
// the same order.
KVC_DEVICE void rotate(float* x, int head_dim, int block) {
  const int lane = thread_lane();
  for (int half = 1; half < block; half *= 2) {
    for (int pair = lane; pair < head_dim / 2; pair += 32) {
      const int at = pair / half * 2 * half + pair % half;
      const float a = x[at], b = x[at + half];
      x[at] = a + b;
      x[at + half] = a - b;
    }
    __syncwarp();
  }
  // 1 / sqrt(block), rounded once: block is a power of two.
  float norm = 1.f;
  for (int b = block; b > 1; b /= 4) norm *= b == 2 ? 0.70710678118654752f : 0.5f;
  for (int d = lane; d < head_dim; d += 32) x[d] *= norm;
  __syncwarp();
}
#endif
