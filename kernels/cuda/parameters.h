// Arguments that only the CUDA kernels take, beside the structs of abi.h. Kernels get both by value; the host
// pointer `layout` inside KvcRows means nothing on a GPU, so the layout itself is passed along.
//
// Where a kernel takes a `clock`, the positions in its structs count from what that holds (null: from 0), so that a
// decoding step starts its kernels with the very same arguments every time and can be replayed from a CUDA graph.
#ifndef KVC_CUDA_PARAMETERS_H
#define KVC_CUDA_PARAMETERS_H
#include "abi.h"

typedef struct {
  int32_t width[KVC_MAX_TIERS];  // slots of each tier that are gone over
  int32_t tiles;                 // 16-slot tiles of one row: all tiers' and the tail's
} KvcWidths;

typedef struct {         // memory of the tensor-core decode; partial sums and logits are of one step only
  float* partial;        // [2 * blocks][8 or 16 heads][head_dim] sums of rows that several blocks share
  float* partial_max;    // [2 * blocks][8 or 16] their largest logit, in powers of two
  float* partial_sum;    // [2 * blocks][8 or 16]
  int32_t* arrived;      // [rows x head tiles + 2] blocks done with a row; at the end; waiting; zero between steps
  float* lse;            // [batch, q_heads] log-sum-exp of this step
  int32_t* clock;        // [1] logical position of the next token; grows with every token appended
  float* logits;         // [blocks of 16 slots][16][heads, an even number up to 8 or 16], for statistics; null without
} KvcWorkspace;

typedef struct {         // how far a step of one position turns each pair of channels
  uint64_t step[KVC_MAX_HEAD_DIM / 2];  // in 2^-64 of a turn; whole turns are left out, as they are of its multiples
} KvcTurns;

typedef struct {         // memory of the tensor-core chunk_attention, for one call
  float* partial;        // [2 * blocks][rows of a tile][head_dim] sums of query tiles that several blocks share
  float* partial_max;    // [2 * blocks][rows of a tile] their largest logit, in powers of two
  float* partial_sum;    // [2 * blocks][rows of a tile]
  int32_t* arrived;      // [rows x query tiles] blocks that are done with one; zero before the call
} KvcPartials;
#endif
