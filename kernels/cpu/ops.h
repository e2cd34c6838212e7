// Every operation of the CPU backend, once per instruction set. A source file with kernels is compiled several
// times, each time with KVC_ISA set to avx512, avx2 or scalar (and KVC_ISA_avx512 etc. defined to 1): it puts
// everything it defines into namespace kvc::KVC_ISA or makes it static, so that no function compiled for one
// instruction set can be linked into another's code. For the same reason it instantiates no std:: templates
// that may end up out of line.
//
// All operations return KVC_OK or another KVC_ status of abi.h, and validate, before they write anything, what cannot
// be checked from Python without reading tensors: page ids and lengths (tables.h), a full tail; shapes, types and the
// sources of tokens are the caller's responsibility.
#ifndef KVC_OPS_H
#define KVC_OPS_H
#include "plan_abi.h"

#define KVC_DECLARE_OPS(isa)      \
  namespace kvc {                 \
  namespace isa {                 \
  int append(KvcAppend*);         \
  int pack(KvcPack*);             \
  int move(KvcMove*);             \
  int retier(KvcRetier*);         \
  int fields(KvcFields*);         \
  int dense(KvcDense*);           \
  int slot_sums(KvcSlotSums*);    \
  int hadamard(KvcHadamard*);     \
  int convert(KvcConvert*);       \
  int decode(KvcDecode*);         \
  int chunk(KvcChunk*);           \
  int scores(KvcScores*);         \
  int non_causal(KvcNonCausal*);  \
  int linear(KvcLinear*);         \
  int gather(KvcGather*);         \
  int lowest(KvcLowest*);         \
  int prices(KvcPrices*);         \
  int holes(KvcHoles*);           \
  int places(KvcPlaces*);         \
  int tally(KvcTally*);           \
  int shares(KvcShares*);         \
  int key_shift(KvcKeyShift*);    \
  int tier_losses(KvcTierLosses*);\
  int fit_maps(KvcFitMaps*);      \
  int foresee(KvcForesee*);       \
  }                               \
  }
KVC_DECLARE_OPS(avx512)
KVC_DECLARE_OPS(avx2)
KVC_DECLARE_OPS(scalar)
#endif
