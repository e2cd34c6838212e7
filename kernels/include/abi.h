// The C ABI between Python (ctypes) and a CPU backend: one pre-packed argument struct per operation.
// All strides are in elements of the pointed-to type; the last dimension is always contiguous.
// Rows of a call are ordered [batch][kv_heads]: row = b * kv_heads + h.
#ifndef KVC_ABI_H
#define KVC_ABI_H
#include "page_layout.h"

#define KVC_FEEDBACK_RANK 4  // directions in which errors of rotated keys are collected

// What every operation returns; with anything but KVC_OK it has changed nothing.
enum { KVC_OK = 0, KVC_BAD_ARGUMENT = 1, KVC_TAIL_FULL = 2, KVC_NO_ISA = 3, KVC_BAD_PAGE = 4 };

typedef struct {  // where the packed slots of the call's rows live
  const KvcLayout* layout;
  const int64_t* slabs;                   // base address of each slab
  int32_t slab_shift, rows;               // page id -> slab id >> shift, page id & ((1 << shift) - 1) inside it
  const int32_t* table[KVC_MAX_TIERS];    // [rows, table_stride[t]] page ids
  int64_t table_stride[KVC_MAX_TIERS];
  const int32_t* length[KVC_MAX_TIERS];   // [rows] slots in use; only the first tier.slots * pages are read
  const int32_t* slab_pages;              // [n_slabs] pages of each slab, on the host; for the CPU's checks only
  const uint16_t* key_feedback;           // [rows, 2, KVC_FEEDBACK_RANK, head_dim] bf16 (quantize.py), or null
  const void* evicted_means;              // [rows, 2, D] native dtype, mean key (as in the tail) and value of evicted slots, or null
  const int32_t* evicted_counts;          // [rows] how many these are; null with the means
  int32_t n_slabs, reserved;
} KvcRows;

typedef struct {  // the newest slots, native dtype, row-major; capacity 0 = no tail
  void *k, *v;                            // [batch, kv_heads, capacity, head_dim] contiguous
  int32_t* length;                        // [batch] slots in use
  int32_t* position;                      // [batch, capacity] logical positions
  void* fields;                           // [n_fields, batch, kv_heads, capacity] 4-byte values, or null
  int64_t capacity;
} KvcTail;

typedef struct {  // write n_k new tokens per sequence at tail.length[b] onwards, skipping padding
  KvcTail tail;
  const void *k, *v;                      // [batch, kv_heads, n_k, D] native dtype
  int64_t k_b, k_h, k_t, v_b, v_h, v_t;
  const uint8_t* valid;                   // [batch, n_k] contiguous, 0 = padding, not stored; null = all valid
  int32_t position;                       // logical position of token 0
  int32_t batch, kv_heads, n_k;
  int32_t head_dim, dtype, n_fields;      // the fields of a new tail slot are set to zero
  int32_t reserved;
} KvcAppend;

typedef struct {  // one new token per sequence: append to the tail, attend to every tier and the tail
  KvcRows rows;
  KvcTail tail;
  const void *q, *k, *v;                  // q [batch, q_heads, D], k and v [batch, kv_heads, D], native dtype
  int64_t q_b, q_h, k_b, k_h, v_b, v_h;
  void* out;                              // [batch, q_heads, D] native dtype
  int64_t out_b, out_h;
  const float* sinks;                     // [q_heads] extra logit in the denominator, or null
  const uint8_t* valid;                   // [batch] 0 = the new token is padding (not stored, output zero), or null
  const void* key_shift;                  // [batch, kv_heads, D] native dtype, taken off k as it is written, or null (CPU)
  float scale, softcap;                   // softcap 0 = none
  int32_t window;                         // attend only where query position - slot position < window; 0 = none
  int32_t position_field;                 // index of the int32 position field; -1 when window is 0
  int32_t position;                       // logical position of the new token
  int32_t batch, kv_heads, group;
  int32_t append;                         // 1: write k, v at tail.length[b] first and increment it
  int32_t sum_field, square_field;        // += sum over the group of p, of p^2, per slot; -1 = do not
  int32_t rotates_values;                 // 1: v is rotated as it is written, and the output back (CPU)
} KvcDecode;

typedef struct {  // n_q queries over the packed past, the tail, and a dense block of n_k new keys
  KvcRows rows;
  KvcTail tail;
  const void *q, *k, *v;                  // q [batch, q_heads, n_q, D]; k, v [batch, kv_heads, n_k, D]
  int64_t q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t;
  void* out;                              // [batch, n_q, q_heads, D] by strides
  int64_t out_b, out_h, out_t;
  float* lse;                             // [batch, q_heads, n_q] natural-log sum of exp, or null; CUDA alone writes it
  const uint8_t* allowed;                 // [batch, n_q, n_k] may query i see new key j; null = causal
  const float* bias;                      // [batch, n_q, n_k] added to the logits of new keys, or null
  const float* sinks;
  float scale, softcap;
  int32_t window, position_field;
  int32_t position;                       // logical position of query 0; new key j has key_position + j
  int32_t key_position;
  int32_t batch, kv_heads, group, n_q, n_k;
} KvcChunk;

typedef struct {  // one power's sums
  float* past[KVC_MAX_TIERS];             // [batch, q_heads, past_stride[t]] of packed slots, in slot order
  float* tail;                            // [batch, q_heads, capacity], or null
  float* fresh;                           // [batch, q_heads, n_k]
} KvcSums;

typedef struct {  // sums over the queries of p and of p^2, or the largest p, for every key, per query head
  KvcRows rows;
  KvcTail tail;
  const void *q, *k;                      // q [batch, q_heads, n_q, D]; k [batch, kv_heads, n_k, D]
  int64_t q_b, q_h, q_t, k_b, k_h, k_t;
  const uint8_t* query_valid;             // [batch, n_q] or null
  const uint8_t* key_valid;               // [batch, n_k] or null
  KvcSums sum, square;                    // where the sums of p and of p^2 go
  int64_t past_stride[KVC_MAX_TIERS];
  const float* sinks;
  float scale, softcap;
  int32_t window, position_field, position, key_position;
  int32_t exclude;                        // a query at i scores key j only if i - j >= exclude (0 = all)
  int32_t powers;                         // 1: sum is wanted, 2: square, 3: both, 5: the largest p instead of the sum
  int32_t batch, kv_heads, group, n_q, n_k;
} KvcScores;

typedef struct {  // squared probabilities that n tokens would give each other if they came again, summed over queries
  const void *q, *k;                      // q [batch, q_heads, n, D]; k [batch, kv_heads, n, D], native dtype
  int64_t q_b, q_h, q_t, k_b, k_h, k_t;
  const uint8_t* valid;                   // [batch, n], 0 = padding, or null
  const float* inv_freq;                  // [pairs] radians per position of each pair of channels
  const float* sinks;
  float* scores;                          // [batch, q_heads, n] contiguous, zeros: added to
  float scale, softcap;
  int32_t pairs, start, interleaved;      // pair i: channels start + i and start + pairs + i, or two neighbours
  int32_t dtype, head_dim, batch, kv_heads, group, n;
  int32_t reserved;
} KvcNonCausal;

typedef struct {  // out = x weight^T + bias, of a few rows x; everything in one 16-bit dtype, sums in float32
  const void* x;                          // [rows, in_features]
  const void* weight;                     // [out_features, in_features]
  const void* bias;                       // [out_features], or null
  void* out;                              // [rows, out_features]
  int64_t x_stride, weight_stride, out_stride;
  int32_t rows;                           // 1 to 4
  int32_t in_features, out_features, dtype;
} KvcLinear;

typedef struct {  // add count[b][h] slots to each row, at slot length[tier][row] onwards; pages already in the table
  KvcRows rows;
  int32_t tier, batch, kv_heads, n_fields;
  const void *k, *v;                      // [batch, kv_heads, T, D] native dtype
  int64_t k_b, k_h, k_t, v_b, v_h, v_t;
  const int32_t* index;                   // [batch, kv_heads, T] source token of each new slot; null = 0, 1, 2 ...
  int64_t index_b, index_h;
  const int32_t* count;                   // [batch, kv_heads]
  int64_t count_b, count_h;
  const int32_t* field[KVC_MAX_FIELDS];   // [batch, kv_heads, T] 4-byte values by source token
  int64_t field_b[KVC_MAX_FIELDS], field_h[KVC_MAX_FIELDS];
  int32_t overflow;                       // out: slots whose scale or offset left fp16's range
  int32_t reserved;
} KvcPack;

typedef struct {  // slot src -> slot dst inside the same row and tier, keys, values, params and fields together
  KvcRows rows;
  int32_t tier, n;
  const int32_t *row, *dst, *src;         // [n]; sources and destinations never overlap
} KvcMove;

typedef struct {  // slot src of src_tier -> slot dst of dst_tier, re-quantised, fields copied
  KvcRows rows;
  int32_t src_tier, dst_tier, n, overflow;
  const int32_t *row, *dst, *src;
} KvcRetier;

typedef struct {  // 4-byte field of every slot <-> [rows, stride]
  KvcRows rows;
  int32_t tier, field, write, reserved;
  void* values;
  int64_t stride;
} KvcFields;

typedef struct {  // dequantised, un-rotated slots as float [rows, stride, D]
  KvcRows rows;
  int32_t tier, reserved;
  float *k, *v;
  int64_t stride;
} KvcDense;

typedef struct {  // sums over chosen slots of each row, dequantised, un-rotated
  KvcRows rows;
  int32_t tier, reserved;
  const uint8_t* chosen;                  // [rows, stride]; what lies beyond a row's length is ignored
  float* sums;                            // [rows, 2, D] of keys and of values, zeros: added to
  int64_t stride;
} KvcSlotSums;

typedef struct {  // orthonormal Walsh-Hadamard transform of blocks of vectors; sums in float32, rounded once
  const void* x;                          // [batch, outer, inner, D] native dtype
  int64_t x_b, x_h, x_t;
  void* out;                              // likewise, contiguous
  int32_t batch, outer, inner, head_dim, block, dtype;  // block: a power of two, at least 16, that divides head_dim
} KvcHadamard;

typedef struct {  // pages in CPU order <-> canonical order (page_layout.h); bytes outside the sections are copied
  const KvcLayout* layout;
  const uint8_t* from;                    // [n, page_bytes]
  uint8_t* to;                            // [n, page_bytes], another buffer
  int32_t tier, n, to_canonical, reserved;
} KvcConvert;
#endif
