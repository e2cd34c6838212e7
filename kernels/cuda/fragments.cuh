// Codes of pages as operands of the tensor cores. Lanes load words of a slot's row as they lie, so a fragment holds the
// head dimensions in an order of its own; whoever multiplies with it puts the other operand in the same order.
//
// Lane (g, t) of a warp is lane 4 g + t.
#ifndef KVC_FRAGMENTS_CUH
#define KVC_FRAGMENTS_CUH
#include "pages.cuh"

constexpr int kNative = 16;  // bits of a native element

// A code becomes a number by a mask alone: an fp16 with nothing but a few bits in its mantissa is subnormal, code *
// 2^(place - 24), exactly, where its lowest bit lies at `place`. Tensor cores multiply such numbers as any others. What
// is then too small goes where it costs nothing: 2^-place of a key to the query's element, 2^24 to the factor of the
// logits, and that of values to the sums of a whole section. What aligning products in fp32 loses stays far below what
// quantising lost: it is as if codes at place 0 had 1024 added to them.

KVC_DEVICE float power_of_two(int n) { return bits_float(static_cast<uint32_t>(127 + n) << 23); }

// Keys. Register r of a word holds codes r and r + 16 / kBits.

// Where it holds them; of 2 bits those at 0 to 8 as they lie, the others when the word has been moved.
template <int kBits>
KVC_DEVICE constexpr int key_place(int r) {
  if (kBits == 4) return r % 2 * 4;
  return kBits == 2 ? r % 5 * 2 : 0;
}

// Register r of a word; a native word is one already.
template <int kBits, int r>
KVC_DEVICE uint32_t key_pair(uint32_t word) {
  if (kBits == kNative) return word;
  if (kBits == 8) return r ? select_bytes(word, 0, 0x4341) : word & 0x00ff00ffu;
  constexpr int bits = kBits % 16, in_word = bits == 4 ? 2 : 5;  // registers before the word is moved
  constexpr uint32_t mask = ((1u << bits) - 1) * 0x00010001u << key_place<bits>(r);
  return (r < in_word ? word : word >> in_word * bits) & mask;
}

// Values. What is taken off their codes, so that rounding a probability costs no more than it would with the values
// themselves. It is taken off a section's sums: this, times the sum of the probabilities as they were rounded.
template <int kBits>
constexpr int kMiddle = kBits == 8 ? 128 : kBits == 4 ? 8 : kBits == 2 ? 2 : 0;

// Where code c of a word lies in its register.
template <int kBits>
KVC_DEVICE constexpr int value_place(int c) { return kBits < 8 ? c * kBits % 8 : 0; }

// Code c of two words of different slots as a register of two fp16 (native: element c).
template <int kBits, int c>
KVC_DEVICE uint32_t value_pair(uint32_t a, uint32_t b) {
  if (kBits == kNative) return select_bytes(a, b, c ? 0x7632 : 0x5410);
  if (kBits == 8) {  // the bytes of two codes at once, then one more step for each
    const uint32_t both = select_bytes(a, b, c < 2 ? 0x5140 : 0x7362);
    return c % 2 ? select_bytes(both, 0, 0x4342) : select_bytes(both, 0, 0x4140);
  }
  constexpr int bits = kBits % 16, byte = c * bits / 8 % 4;
  const uint32_t both = select_bytes(a, b, byte | (byte + 4) << 8);  // code bytes in bits 0..7 and 16..23
  return both & ((1u << bits) - 1) * 0x00010001u << value_place<bits>(c);
}

template <int kBytes, bool kGlobal = true>
KVC_DEVICE void load_bytes(uint32_t* to, const uint8_t* from) {
  if (kGlobal) KVC_IS_GLOBAL(from);
  if (kBytes == 2) to[0] = *reinterpret_cast<const uint16_t*>(from);
  if (kBytes == 4) to[0] = *reinterpret_cast<const uint32_t*>(from);
  if (kBytes == 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  }
  if (kBytes >= 16) {
    KVC_UNROLL
    for (int i = 0; i < kBytes / 16; i++) {
      const uint4 x = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  }
}

// How the row of a slot's keys is spread over the four lanes t that hold it.
template <int kDim, int kBits>
struct KeyRow {
  static constexpr int kBytes = kDim * kBits / 8;
  static constexpr int kPiece = kBytes / 4 < 16 ? kBytes / 4 : 16;  // bytes a lane loads at once
  static constexpr int kWords = kBytes / 16;                        // of one lane
  static constexpr int kPairs = 16 / kBits;                         // registers that a word becomes
  // Byte of the row where word w of lane t lies: four pieces next to each other, then the next four.
  KVC_DEVICE_METHOD static constexpr int offset(int t, int w) {
    return 4 * w / kPiece * 4 * kPiece + t * kPiece + 4 * w % kPiece;
  }
  // The first dimension of register `pair` of lane t, the other is 16 / kBits on.
  KVC_DEVICE_METHOD static constexpr int dimension(int t, int pair) {
    return offset(t, pair / kPairs) * 8 / kBits + pair % kPairs;
  }
};

// How the row of a slot's values is spread over the eight lanes g that hold it: each has kDim / 8 dimensions running,
// or its part of them where kShare warps take the same slots.
template <int kDim, int kBits, int kShare>
struct ValueRow {
  static constexpr int kBytes = kDim * kBits / 8;
  static constexpr int kPiece = kBytes / 8 / kShare;
  static constexpr int kWords = kPiece < 4 ? 1 : kPiece / 4;
  static constexpr int kPerWord = 32 / kBits;
};

KVC_DEVICE float half_of_pair(uint32_t pair, int which) {
  return half_to_float(static_cast<uint16_t>(which ? pair >> 16 : pair));
}

// Loops over compile-time numbers, so that byte selectors and masks are constants.
template <int kFrom, int kTo>
struct Repeat {
  template <class Body>
  KVC_DEVICE_METHOD static void run(const Body& body) {
    body.template step<kFrom>();
    Repeat<kFrom + 1, kTo>::run(body);
  }
};
template <int kTo>
struct Repeat<kTo, kTo> {
  template <class Body>
  KVC_DEVICE_METHOD static void run(const Body&) {}
};

template <bool kBfloat>
KVC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (kBfloat) mma_bf16(c, a, b0, b1);
  else mma_f16(c, a, b0, b1);
}
#endif
