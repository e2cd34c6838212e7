// Checks of page tables and of new tokens before anything is written: code that follows a wrong page id reads and
// writes memory that belongs to others. A page costs one comparison or two here, and a microsecond to read.
#ifndef KVC_TABLES_H
#define KVC_TABLES_H
#include "abi.h"

namespace kvc {
namespace KVC_ISA {

static inline bool page_known(const int32_t* slab_pages, int32_t n_slabs, int32_t shift, int32_t id) {
  const int32_t slab = id >> shift;
  return slab >= 0 && slab < n_slabs && (id & ((1 << shift) - 1)) < slab_pages[slab];
}

// Whether the table of a tier names a page of some slab for every slot from..until of a row.
static inline bool slots_known(const KvcRows& rows, int tier, int64_t row, int64_t from, int64_t until) {
  const int64_t per_page = rows.layout->tier[tier].slots;
  if (from < 0 || until > rows.table_stride[tier] * per_page) return false;
  const int32_t* table = rows.table[tier] + row * rows.table_stride[tier];
  for (int64_t i = from / per_page; i * per_page < until; ++i)
    if (!page_known(rows.slab_pages, rows.n_slabs, rows.slab_shift, table[i])) return false;
  return true;
}

static inline bool slot_known(const KvcRows& rows, int tier, int row, int slot) {
  return row >= 0 && row < rows.rows && slots_known(rows, tier, row, slot, (int64_t)slot + 1);
}

// The same for every slot that rows hold in a tier.
static inline bool tier_known(const KvcRows& rows, int tier) {
  for (int row = 0; row < rows.rows; ++row)
    if (rows.length[tier][row] < 0 || !slots_known(rows, tier, row, 0, rows.length[tier][row])) return false;
  return true;
}

static inline bool all_known(const KvcRows& rows) {
  for (int tier = 0; tier < rows.layout->n_tiers; ++tier)
    if (!tier_known(rows, tier)) return false;
  return true;
}

// Whether n tokens from a position on, and queries, have positions that 32 bits hold.
static inline bool positions_fit(int32_t position, int32_t n) {
  return position >= 0 && n >= 0 && (int64_t)position + n <= INT32_MAX;
}

}  // namespace KVC_ISA
}  // namespace kvc
#endif
