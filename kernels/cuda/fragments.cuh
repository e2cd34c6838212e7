// Codes of pages as operands of the tensor cores. Lanes load words of a slot's row as they lie, so a fragment holds the
// head dimensions in an order of its own; whoever multiplies with it puts the other operand in the same order.
//
// Lane (g, t) of a warp is lane 4 g + t.
#ifndef KVC_FRAGMENTS_CUH
#define KVC_FRAGMENTS_CUH
#include "pages.cuh"

constexpr int kNative = 16;  // bits of a native element

// Two fp16 whose mantissas take codes at bit kBit as they are: then they are the codes plus 2^(10 - kBit).
template <int kBit>
constexpr uint32_t kHolder = static_cast<uint32_t>(25 - kBit) << 10 | static_cast<uint32_t>(25 - kBit) << 26;

// Codes of kBits bits that lie at bit kBit of both halves -> (code - kMiddle) in fp16, exactly: 1024 + 2^kBit * code,
// divided and brought down by one instruction.
template <int kBits, int kBit, int kMiddle>
KVC_DEVICE uint32_t codes_to_halves(uint32_t word) {
  constexpr uint32_t both = 0x00010001u;
  constexpr uint32_t down = (static_cast<uint32_t>(25 - kBit) << 10) + (kMiddle << kBit);
  const uint32_t biased = masked_or(word, ((1u << kBits) - 1) * both << kBit, kHolder<0>);
  if (kBit == 0) return half2_subtract(biased, down * both);
  return half2_fma(biased, (static_cast<uint32_t>(15 - kBit) << 10) * both, (down | 0x8000u) * both);
}

// Keys. Register r of a word holds codes r and r + 16 / kBits, some of them with a bias. A dot product is then too
// large by the bias times the sum of the other operand; that is taken off where the sum begins, which costs nothing,
// while taking it off every register would cost an instruction for each. What rounding in fp32 loses by it stays far
// below what quantising lost: the bias is four times the range of codes of 8 and 4 bits, and about ten times that of 2.

// Where a biased code of 2 bits lies when its word has been moved, of those at bits 4, 6 and 8 that need no more.
KVC_DEVICE constexpr int two_bit_place(int r) { return r < 2 ? 2 * r + 4 : r < 5 ? 2 * r : 2 * r - 6; }

template <int kBits>
KVC_DEVICE constexpr float key_bias(int r) {
  if (kBits == 8) return 1024.f;
  if (kBits == 4) return r % 2 ? 64.f : 0.f;
  return kBits == 2 ? static_cast<float>(1 << (10 - two_bit_place(r))) : 0.f;
}

// Register r of a word; a native word is one already.
template <int kBits, int r>
KVC_DEVICE uint32_t key_pair(uint32_t word) {
  if (kBits == kNative) return word;
  if (kBits == 8) return select_bytes(word, kHolder<0>, r ? 0x7371 : 0x7270);
  if (kBits == 4) {
    const uint32_t there = r < 2 ? word : word >> 8;
    return r % 2 ? masked_or(there, 0x00f000f0u, kHolder<4>) : codes_to_halves<4, 0, 0>(there);
  }
  constexpr int place = kBits == 2 ? two_bit_place(r) : 0;
  return masked_or(r < 2 ? word << 4 : r < 5 ? word : word >> 6, 0x00030003u << place, kHolder<place>);
}

// Values. What is taken off their codes, so that rounding a probability costs no more than it would with the values
// themselves, and sums over many slots stay small.
template <int kBits>
constexpr int kMiddle = kBits == 8 ? 128 : kBits == 4 ? 8 : kBits == 2 ? 2 : 0;

// Code c of two words of different slots, less the middle, as a register of two fp16 (native: element c).
template <int kBits, int c>
KVC_DEVICE uint32_t value_pair(uint32_t a, uint32_t b) {
  if (kBits == kNative) return select_bytes(a, b, c ? 0x7632 : 0x5410);
  if (kBits == 8) {  // the bytes of two codes at once, then one more step for each
    const uint32_t both = select_bytes(a, b, c < 2 ? 0x5140 : 0x7362);
    const uint32_t biased = select_bytes(both, kHolder<0>, c % 2 ? 0x7372 : 0x7170);
    return half2_subtract(biased, kHolder<0> + kMiddle<kBits> * 0x10001u);
  }
  constexpr int byte = c * kBits / 8 % 4, bit = c * kBits % 8;
  const uint32_t both = select_bytes(a, b, byte | (byte + 4) << 8);  // code bytes in bits 0..7 and 16..23
  return codes_to_halves<kBits % 16, bit, kMiddle<kBits>>(both);
}

template <int kBytes>
KVC_DEVICE void load_bytes(uint32_t* to, const uint8_t* from) {
  KVC_IS_GLOBAL(from);
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
