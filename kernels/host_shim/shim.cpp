// All kernels in one library, to be launched by name.
#define KVC_HOST_SHIM 1  // kernels see the shim in place of PTX
#include "pages.cuh"     // outside the namespaces below

namespace storage {
#include "storage.cu"
}
namespace attention {
#include "attention.cu"
}

#define KVC_HEAD_DIM 64
namespace decode64 {
#include "decode.cu"
}
#undef KVC_HEAD_DIM
#define KVC_HEAD_DIM 128
namespace decode128 {
#include "decode.cu"
}
#undef KVC_HEAD_DIM
#define KVC_HEAD_DIM 256
namespace decode256 {
#include "decode.cu"
}

extern "C" int kvc_shim_launch(const char* name, int order, uint32_t grid, uint32_t block, void** parameters) {
  shim::order = order;
#define KVC_LAUNCH(place, kernel) \
  if (strcmp(name, #kernel) == 0) return shim::launch(place::kernel, grid, block, parameters);
  KVC_LAUNCH(storage, kvc_pack)
  KVC_LAUNCH(storage, kvc_move)
  KVC_LAUNCH(storage, kvc_retier)
  KVC_LAUNCH(storage, kvc_fields)
  KVC_LAUNCH(storage, kvc_dense)
  KVC_LAUNCH(storage, kvc_copy)
  KVC_LAUNCH(storage, kvc_append)
  KVC_LAUNCH(storage, kvc_advance)
  KVC_LAUNCH(attention, kvc_chunk)
  KVC_LAUNCH(attention, kvc_scores)
  KVC_LAUNCH(attention, kvc_statistics)
  KVC_LAUNCH(decode64, kvc_decode_64_f16)
  KVC_LAUNCH(decode64, kvc_decode_64_bf16)
  KVC_LAUNCH(decode128, kvc_decode_128_f16)
  KVC_LAUNCH(decode128, kvc_decode_128_bf16)
  KVC_LAUNCH(decode256, kvc_decode_256_f16)
  KVC_LAUNCH(decode256, kvc_decode_256_bf16)
#undef KVC_LAUNCH
  return 3;
}
