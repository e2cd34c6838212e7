// The one place where page sizes and section offsets are computed.
#include <cmath>

#include "abi.h"

namespace {

int64_t native_bytes(int32_t dtype) { return dtype == KVC_F32 ? 4 : 2; }

bool known_bits(int32_t bits) { return bits == 8 || bits == 4 || bits == 2; }

// Fills the offsets of a tier for `slots` slots per page and returns the bytes in use.
int64_t place(const KvcLayout& layout, KvcTier& tier, int64_t slots) {
  const bool native = tier.key_bits == 0;
  const int64_t elements = slots * layout.head_dim;
  const int64_t native_size = elements * native_bytes(layout.dtype);
  const int64_t params = native ? 0 : slots * 4;
  tier.slots = static_cast<int32_t>(slots);
  tier.keys = 0;
  tier.key_params = tier.keys + (native ? native_size : elements * tier.key_bits / 8);
  tier.values = tier.key_params + params;
  tier.value_params = tier.values + (native ? native_size : elements * tier.value_bits / 8);
  tier.fields = tier.value_params + params;
  tier.used = tier.fields + 4 * slots * layout.n_fields;
  return tier.used;
}

// Largest multiple of 16 slots that fits into the page; 0 when not even 16 do.
int64_t slots_that_fit(const KvcLayout& layout, KvcTier& tier, int64_t page_bytes) {
  const int64_t unit = place(layout, tier, KVC_SLOT_MULTIPLE);  // bytes are proportional to slots
  return page_bytes / unit * KVC_SLOT_MULTIPLE;
}

constexpr int64_t kPreferredBytes = 8 << 10;
constexpr int64_t kBytesPerDim = 96;  // with several tiers every head holds half a page too much of each: keep them small
constexpr int64_t kSingleTierSlots = 64;

// Pages must hold slots of every tier; beyond that only the tiers count in which slots stay.
int64_t choose_page_bytes(KvcLayout& layout) {
  int64_t smallest = 0;
  int resting[KVC_MAX_TIERS], n_resting = 0;
  for (int i = 0; i < layout.n_tiers; i++) {
    const int64_t unit = place(layout, layout.tier[i], KVC_SLOT_MULTIPLE);
    if (unit > smallest) smallest = unit;
    if (layout.resting == 0 || layout.resting >> i & 1) resting[n_resting++] = i;
  }
  const int64_t several = kBytesPerDim * layout.head_dim;
  const int64_t limit = n_resting == 1 ? smallest * kSingleTierSlots : smallest > several ? smallest : several;
  int64_t best = smallest;
  double best_waste = 1e9, best_distance = 1e9;
  for (int i = 0; i < n_resting; i++) {
    for (int64_t slots = KVC_SLOT_MULTIPLE; ; slots += KVC_SLOT_MULTIPLE) {
      if (n_resting == 1 && slots > kSingleTierSlots) break;
      const int64_t page_bytes = place(layout, layout.tier[resting[i]], slots);
      if (page_bytes > limit) break;
      if (page_bytes < smallest) continue;
      double waste = 0;
      for (int j = 0; j < n_resting; j++) {
        KvcTier& other = layout.tier[resting[j]];
        const int64_t fit = slots_that_fit(layout, other, page_bytes);
        const double left = 1.0 - static_cast<double>(place(layout, other, fit)) / page_bytes;
        if (left > waste) waste = left;
      }
      waste = std::floor(waste * 200 + 0.5);  // steps of 0.5 %
      const double distance = std::fabs(std::log(static_cast<double>(page_bytes) / kPreferredBytes));
      if (waste < best_waste || (waste == best_waste && distance < best_distance)) {
        best = page_bytes, best_waste = waste, best_distance = distance;
      }
    }
  }
  return best;
}

}  // namespace

// In: head_dim, dtype, n_tiers, n_fields, resting, key_bits and value_bits of each tier, page_bytes (0 = choose).
// Out: everything else. KVC_BAD_ARGUMENT for anything page_layout.h does not allow, or when a page of the given
// bytes (a multiple of 64) cannot hold 16 slots of every tier.
extern "C" __attribute__((visibility("default"))) int kvc_layout(KvcLayout* layout) {
  KvcLayout& l = *layout;
  if (l.head_dim < 16 || l.head_dim > KVC_MAX_HEAD_DIM || l.head_dim % 16) return KVC_BAD_ARGUMENT;
  if (l.dtype != KVC_F32 && l.dtype != KVC_F16 && l.dtype != KVC_BF16) return KVC_BAD_ARGUMENT;
  if (l.n_tiers < 1 || l.n_tiers > KVC_MAX_TIERS) return KVC_BAD_ARGUMENT;
  if (l.n_fields < 0 || l.n_fields > KVC_MAX_FIELDS) return KVC_BAD_ARGUMENT;
  if (l.page_bytes < 0 || l.page_bytes % 64 || l.resting >> l.n_tiers) return KVC_BAD_ARGUMENT;
  for (int i = 0; i < l.n_tiers; i++) {
    KvcTier& tier = l.tier[i];
    const bool native = tier.key_bits == 0 && tier.value_bits == 0;
    if (!native && !(known_bits(tier.key_bits) && known_bits(tier.value_bits))) return KVC_BAD_ARGUMENT;
    tier.rotate_keys = tier.key_bits == 4 || tier.key_bits == 2;
  }
  l.rotation_block = l.head_dim & -l.head_dim;
  if (l.page_bytes == 0) l.page_bytes = choose_page_bytes(l);
  for (int i = 0; i < l.n_tiers; i++) {
    const int64_t slots = slots_that_fit(l, l.tier[i], l.page_bytes);
    if (slots == 0) return KVC_BAD_ARGUMENT;
    place(l, l.tier[i], slots);
  }
  return KVC_OK;
}
