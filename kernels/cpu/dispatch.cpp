// The exported C symbols: which instruction sets this build and this machine have, and every operation with
// the instruction set as its first argument (0 = avx512 with VNNI and BF16, 1 = avx2, 2 = scalar).
#include <string.h>

#include "ops.h"

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Isa { kAvx512 = 0, kAvx2 = 1, kScalar = 2, kIsaCount = 3 };

bool machine_has(int isa) {
  switch (isa) {
#ifdef KVC_HAS_avx512
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
#endif
#ifdef KVC_HAS_avx2
    case kAvx2:  // every processor with avx2 and fma has f16c
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    case kScalar:
      return true;
    default:
      return false;
  }
}

}  // namespace

KVC_EXPORT int kvc_isa_count() { return kIsaCount; }

KVC_EXPORT const char* kvc_isa_name(int isa) {
  switch (isa) {
    case kAvx512: return "avx512vnni";
    case kAvx2: return "avx2";
    case kScalar: return "scalar";
    default: return "";
  }
}

// 1 when this build has code for the instruction set and this machine can run it.
KVC_EXPORT int kvc_isa_available(int isa) { return machine_has(isa); }

KVC_EXPORT int kvc_isa_best() {
  int isa = 0;
  while (!machine_has(isa)) isa++;
  return isa;
}

#ifdef KVC_HAS_avx512
#define KVC_CASE_AVX512(op) case kAvx512: return kvc::avx512::op(args);
#else
#define KVC_CASE_AVX512(op)
#endif
#ifdef KVC_HAS_avx2
#define KVC_CASE_AVX2(op) case kAvx2: return kvc::avx2::op(args);
#else
#define KVC_CASE_AVX2(op)
#endif
#define KVC_OPERATION(op, Args)                       \
  KVC_EXPORT int kvc_##op(int isa, Args* args) {      \
    switch (isa) {                                    \
      KVC_CASE_AVX512(op)                             \
      KVC_CASE_AVX2(op)                               \
      case kScalar: return kvc::scalar::op(args);     \
      default: return KVC_NO_ISA;                     \
    }                                                 \
  }

KVC_OPERATION(append, KvcAppend)
KVC_OPERATION(pack, KvcPack)
KVC_OPERATION(move, KvcMove)
KVC_OPERATION(retier, KvcRetier)
KVC_OPERATION(fields, KvcFields)
KVC_OPERATION(dense, KvcDense)
KVC_OPERATION(slot_sums, KvcSlotSums)
KVC_OPERATION(hadamard, KvcHadamard)
KVC_OPERATION(convert, KvcConvert)
KVC_OPERATION(decode, KvcDecode)
KVC_OPERATION(chunk, KvcChunk)
KVC_OPERATION(scores, KvcScores)
KVC_OPERATION(non_causal, KvcNonCausal)
KVC_OPERATION(linear, KvcLinear)
KVC_OPERATION(gather, KvcGather)
KVC_OPERATION(lowest, KvcLowest)
KVC_OPERATION(prices, KvcPrices)
KVC_OPERATION(holes, KvcHoles)
KVC_OPERATION(places, KvcPlaces)
KVC_OPERATION(tally, KvcTally)
KVC_OPERATION(shares, KvcShares)
KVC_OPERATION(key_shift, KvcKeyShift)
KVC_OPERATION(tier_losses, KvcTierLosses)
KVC_OPERATION(fit_maps, KvcFitMaps)
KVC_OPERATION(foresee, KvcForesee)

// Bytes of the argument struct of an operation (or of "layout"), for Python to check its mirror; -1 = unknown.
KVC_EXPORT int64_t kvc_sizeof(const char* name) {
  const struct {
    const char* name;
    size_t bytes;
  } sizes[] = {
      {"layout", sizeof(KvcLayout)}, {"append", sizeof(KvcAppend)}, {"pack", sizeof(KvcPack)},
      {"move", sizeof(KvcMove)},     {"retier", sizeof(KvcRetier)}, {"fields", sizeof(KvcFields)},
      {"dense", sizeof(KvcDense)},   {"hadamard", sizeof(KvcHadamard)},
      {"convert", sizeof(KvcConvert)}, {"slot_sums", sizeof(KvcSlotSums)},
      {"decode", sizeof(KvcDecode)}, {"chunk", sizeof(KvcChunk)},   {"scores", sizeof(KvcScores)},
      {"non_causal", sizeof(KvcNonCausal)},  {"linear", sizeof(KvcLinear)},
      {"gather", sizeof(KvcGather)}, {"lowest", sizeof(KvcLowest)}, {"prices", sizeof(KvcPrices)},
      {"holes", sizeof(KvcHoles)},   {"places", sizeof(KvcPlaces)}, {"tally", sizeof(KvcTally)},
      {"shares", sizeof(KvcShares)}, {"key_shift", sizeof(KvcKeyShift)}, {"tier_losses", sizeof(KvcTierLosses)},
      {"fit_maps", sizeof(KvcFitMaps)}, {"foresee", sizeof(KvcForesee)},
  };
  for (const auto& entry : sizes) {
    if (strcmp(entry.name, name) == 0) return static_cast<int64_t>(entry.bytes);
  }
  return -1;
}
