// The one place that knows what a page looks like. C, C++ and CUDA C++ read this header; Python reads it
// through kvc_layout() (C ABI) and never re-derives an offset.
//
// A page holds slots of one row (sequence, layer, KV head) in one tier. Its sections, in order, each a multiple
// of 64 bytes because slots is a multiple of 16 and head_dim a multiple of 16:
//   keys          codes, or native elements
//   key_params    fp16 scale[slots], fp16 offset[slots]           (quantised tiers only)
//   values        codes, or native elements
//   value_params  fp16 scale[slots], fp16 offset[slots]           (quantised tiers only)
//   fields        4-byte values [n_fields][slots]                  (what the recipe asks for)
// x ~ code * scale + offset, codes unsigned, one (scale, offset) per slot for keys and one for values.
//
// The *inner order* of keys and values is the backend's own; sizes and section offsets are the same for all.
// Canonical order (files, reference.py, tests): row-major [slots][head_dim]; codes packed little end first
// within a byte (code i of a row sits in byte i*bits/8, at bit (i*bits)%8).
// CUDA order: the canonical one.
// CPU order (AVX512, AVX2 and scalar share it); m = 8 / bits codes per byte:
//   keys,   quantised  [slots/16][head_dim/(4m)][16 slots][4 bytes]: byte e of slot t in block i holds, at bit
//                      j*bits, the code of dim 4*(m*i + j) + e                (one dpbusd = 16 slots x 4 dims)
//   values, quantised  [slots/(4m)][head_dim/16][16 dims][4 bytes]: byte e of dim d in group g holds, at bit
//                      j*bits, the code of slot 4*(m*g + j) + e               (one dpbusd = 16 dims x 4 slots)
//   keys,   fp32       [slots/16][head_dim][16 slots]
//   keys,   fp16/bf16  [slots/16][head_dim/2][16 slots][2 dims]               (one dpbf16 = 16 slots x 2 dims)
//   values, native     [slots][head_dim]
#ifndef KVC_PAGE_LAYOUT_H
#define KVC_PAGE_LAYOUT_H
#include <stdint.h>

#define KVC_MAX_TIERS 4
#define KVC_MAX_FIELDS 4
#define KVC_SLOT_MULTIPLE 16
#define KVC_MAX_HEAD_DIM 256

enum { KVC_F32 = 0, KVC_F16 = 1, KVC_BF16 = 2 };

typedef struct {
  int32_t key_bits, value_bits;  // 8, 4 or 2; both 0 = native
  int32_t rotate_keys;           // 1: keys are stored Hadamard-rotated (key_bits <= 4), queries must be too
  int32_t slots;                 // slots per page, a multiple of 16
  int64_t keys, key_params, values, value_params, fields;  // byte offsets inside the page
  int64_t used;                  // bytes of the page in use; the rest is left over
} KvcTier;

typedef struct {
  int32_t head_dim, dtype;       // KVC_F32, KVC_F16 or KVC_BF16: the native dtype
  int32_t n_tiers, n_fields;
  int64_t page_bytes;
  int32_t rotation_block;        // Hadamard block: the largest power of two dividing head_dim
  uint32_t resting;              // bit i: slots stay in tier i; no bit: in all. A chosen page_bytes suits these tiers
  KvcTier tier[KVC_MAX_TIERS];
} KvcLayout;
#endif
