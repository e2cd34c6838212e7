"""Where the bytes of a store go."""

from dataclasses import dataclass

import torch

from kvcompress_hf.paging.sequence_tensors import SequenceTensors
from kvcompress_hf.paging.tables import Tables


@dataclass
class Usage:
    """Bytes of a store by kind, and the number of pages it holds."""

    payload: int = 0
    metadata: int = 0
    fields: int = 0
    slack: int = 0
    tables: int = 0
    tail: int = 0
    pages: int = 0


def measure_usage(tables: Tables, tensors: SequenceTensors) -> Usage:
    """Adds up the bytes of a store.

    Args:
        tables (`Tables`): Its pages.
        tensors (`SequenceTensors`): Its tensors; each says under what it is counted.

    Returns:
        `Usage`: Bytes by kind.
    """
    usage = Usage()
    references = tables.arena.references
    for tier, layout in enumerate(tables.layout.tiers):
        live = tables.live(tier)
        first = torch.arange(live.shape[1], device=live.device) * layout.slots
        filled = (tables.lengths[tier][:, None] - first).clamp(max=layout.slots)
        # Beams share pages, so slots are counted per page and not per row.
        per_page = torch.zeros(references.numel(), dtype=torch.int64, device=live.device)
        per_page.scatter_reduce_(0, tables.tables[tier][live].long(), filled[live].long(), "amax")
        slots, pages = int(per_page.sum()), int((per_page > 0).sum())
        payload = layout.key_params - layout.keys + layout.value_params - layout.values
        metadata = layout.values - layout.key_params + layout.fields - layout.value_params
        usage.payload += slots * payload // layout.slots
        usage.metadata += slots * metadata // layout.slots
        usage.fields += slots * (layout.used - layout.fields) // layout.slots
        usage.pages += pages
    usage.slack = usage.pages * tables.layout.page_bytes - (usage.payload + usage.metadata + usage.fields)
    for kind, amount in tensors.bytes_by_kind.items():
        setattr(usage, kind, getattr(usage, kind) + amount)
    return usage
