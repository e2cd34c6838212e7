// The C ABI of the operations for plans (kernels/cpu/plan.cpp), as abi.h is that of the operations on pages. Only CPU
// backends have them. Arrays are contiguous, but for keys, values and queries (kernels/cpu/losses.cpp).
#ifndef KVC_PLAN_ABI_H
#define KVC_PLAN_ABI_H
#include "abi.h"

#define KVC_PLAN_BINS 640  // of importance: 16 per octave, 40 octaves (plans/histogram.py)

enum { KVC_NO_MEMORY = 5 };  // besides those of abi.h

typedef struct {  // a 4-byte field of every slot -> [layers, batch, kv_heads, width] by strides; the rest is left as it is
  KvcRows rows;                           // those of layers, one after the other
  uint32_t* values;
  const int32_t* place;                   // [batch] where a sequence goes, -1 = nowhere; null = all as they come
  int64_t width, values_l, values_b, values_h;
  int32_t tier, field, batch, kv_heads;
} KvcGather;

typedef struct {  // the count[row] lowest candidates of each row; of equal scores the lower position, then the first
  const float* scores;                    // [rows, slots]; NaN comes last
  const int32_t* positions;               // [rows, slots]
  const uint8_t* candidates;              // [rows, slots]
  const int64_t* count;                   // [rows]
  uint8_t* chosen;                        // [rows, slots]
  int64_t rows, slots;
} KvcLowest;

typedef struct {  // the score of the (first + page * step)-th lowest candidate of each row, counted from 1
  const float* scores;                    // [rows, slots]; NaN comes last
  const uint8_t* candidates;              // [rows, slots]
  const int64_t *first, *step;            // [rows]
  float* price;                           // [rows, pages], infinite where there are not as many
  int64_t rows, slots, pages;
} KvcPrices;

typedef struct {  // slots that stay and lie behind the first kept[row], from the last down, and holes among those, from 0 up
  const int8_t* marks;                    // [rows, slots]; a slot goes where this is `gone`
  const int32_t *before, *kept;           // [rows] slots held, and how many of them stay; rows that lose none are left out
  int32_t *row, *hole, *mover;            // [room]
  int64_t rows, slots, room;
  int64_t found;                          // out
  int32_t gone, reserved;
} KvcHoles;

typedef struct {  // where a mark is `wanted`, row after row, and how many such of the row come before
  const int8_t* marks;                    // [rows, slots]
  const int32_t* length;                  // [rows] slots that are looked at
  const int32_t* count;                   // [rows] how many are wanted; rows with 0 are not looked at
  int32_t *row, *slot, *rank;             // [room]
  int64_t rows, slots, room;
  int64_t found;                          // out
  int32_t wanted, reserved;
} KvcPlaces;

typedef struct {  // targets brought into order, and how many slots of each tier go to each tier
  const int8_t* targets;                  // [batch, rows, slots] a tier, or below 0
  const uint8_t* filled;                  // [batch, rows, slots]
  const int64_t* begin;                   // [tiers + 1] columns of each tier: from begin[t] to begin[t + 1]
  int8_t* out;                            // [batch, rows, slots] never above a slot's tier; -1 = goes, or no slot
  int32_t* counts;                        // [batch, rows, tiers from, tiers to]
  int64_t rows, slots;                    // rows of a sequence
  int32_t batch, tiers;
} KvcTally;

typedef struct {  // the rate-distortion plan (plans/rate_distortion.py)
  const float* importance;                // [batch, rows, slots]
  const uint8_t *filled, *protects;       // [batch, rows, slots]
  const int32_t* tier_of;                 // [slots] the tier of each column
  const int32_t* slots_per_page;          // [rows, tiers]
  const int64_t* page_bytes;              // [rows]
  const int64_t* allowed;                 // [batch]
  const int32_t* room;                    // [batch, tiers] slots to leave free in each row's started pages
  const int32_t* steps;                   // [batch] steps of the hull
  const int32_t *hull_tier, *offset;      // [batch, KVC_MAX_TIERS] tier of each, and bins above the first
  int8_t* targets;                        // [batch, rows, slots] a tier, or -1
  int64_t batch, rows, slots;
  int32_t tiers, shift;                   // bins are bits of a score >> shift, counted from the top
  int32_t guesses, reserved;
} KvcShares;

typedef struct {  // what is taken off the keys of each head (paging/key_shift.py)
  const void *k, *q;                      // k [batch, kv_heads, n, D]; the last n_q queries, scaled, [batch, q_heads, n_q, D]
  int64_t k_b, k_h, k_t, q_b, q_h, q_t;
  const uint8_t* valid;                   // [batch, n] 0 = padding; null = all valid
  float* shift;                           // [batch, kv_heads, D], zero for heads that do not gain
  float most;                             // a head gains if no more than this share of its squared error is left
  int32_t bits, dtype, head_dim;          // of codes; of 4 and fewer, keys are rotated
  int32_t batch, kv_heads, group, n, n_q;
  int32_t reserved;
} KvcKeyShift;

typedef struct {  // what storing a slot in a tier loses, over what evicting it would (plans/distortion.py)
  const void *k, *v, *q;                  // [batch, kv_heads, n, D] and [batch, q_heads, n, D], native dtype
  int64_t k_b, k_h, k_t, v_b, v_h, v_t, q_b, q_h, q_t;
  const int64_t* count;                   // [batch] tokens that are no padding, which is in front; null = n
  float* loss;                            // [batch, kv_heads, tiers]; NaN for a sequence without tokens
  int32_t key_bits[KVC_MAX_TIERS], value_bits[KVC_MAX_TIERS];  // 0 = native
  float scale;                            // on logits
  int32_t tiers, dtype, head_dim, batch, kv_heads, group, n;
} KvcTierLosses;

typedef struct {  // the linear map from keys to queries that fits pairs of them best (observers/foreseen.py)
  const void *k, *q;                      // [batch, kv_heads, n, D] and [batch, q_heads, n, D], native dtype
  int64_t k_b, k_h, k_t, q_b, q_h, q_t;
  const float* inv_freq;                  // [pairs]
  float *mapping, *offset;                // [batch, q_heads, D, D] and [batch, q_heads, D]
  float* explained;                       // [batch, q_heads] share of queries' variance, on pairs left out
  float ridge, gain;                      // of the mean variance of a key's channels; what maps are multiplied by
  int32_t pairs, start, interleaved, dtype, head_dim;
  int32_t batch, kv_heads, group, n;
  int32_t step, apart;                    // from one first token to the next; one pair of so many is left out
  int32_t reserved;
} KvcFitMaps;

typedef struct {  // queries as if each token knew the next one (observers/foreseen.py)
  const void* k;                          // [batch, kv_heads, n, D], native dtype, with rotary embedding
  int64_t k_b, k_h, k_t;
  const float *mapping, *offset;          // [batch, q_heads, D, D] and [batch, q_heads, D]: key @ mapping + offset
  const float* inv_freq;                  // [pairs]
  void* out;                              // [batch, q_heads, n, D]; the last token's is left as it is
  int32_t pairs, start, interleaved, dtype, head_dim;
  int32_t batch, kv_heads, group, n, reserved;
} KvcForesee;
#endif
