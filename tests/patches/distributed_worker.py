"""Run by `test_distributed.py` in two processes: a model split over them, stock against patched."""

import os
import sys
import weakref

import torch
import torch.distributed
import torch.distributed.nn  # before a process group: its functions' defaults keep the one that is there
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kvcompress_hf import patch
from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import cache_of


def split_prompts(folder: str) -> None:
    """Data parallel: each process has the whole model and some of the prompts."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    saved = torch.load(os.path.join(folder, "expected.pt"))
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    for route in ("auto", "interface"):
        model = patch(AutoModelForCausalLM.from_pretrained(folder).eval(), "lossless", route=route)
        said = []
        with state.split_between_processes(list(range(len(saved["tokens"])))) as rows:
            assert 0 < len(rows) < len(saved["tokens"])
            for row in rows:
                one = {name: tensor[row : row + 1] for name, tensor in saved["inputs"].items()}
                said.append(model.generate(**one, **saved["arguments"])[0].tolist())
        assert gather_object(said) == saved["tokens"].tolist(), f"{route}: other tokens than in one process"
    state.wait_for_everyone()
    group = weakref.ref(torch.distributed.group.WORLD)
    state.destroy_process_group()
    # What holds it keeps its threads to the very end of the process, which one of them may abort.
    assert group() is None, f"{route}: the process group is still held"


def main(folder: str, split: str) -> None:
    torch.set_num_threads(1)
    if split == "prompts":
        split_prompts(folder)
        return
    saved = torch.load(os.path.join(folder, "expected.pt"))
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{split: 2})).eval()
    for route in ("auto", "interface"):
        patch(model, "lossless", route=route)
        out = model.generate(**saved["inputs"], **saved["arguments"], return_dict_in_generate=True)
        assert isinstance(cache_of(out), CompressedPagedCache)
        assert torch.equal(out.sequences, saved["tokens"]), f"{split}, {route}: other tokens than in one process"
        patch(model, "kv-compress", budget=0.5)
        tokens = model.generate(**saved["inputs"], **saved["arguments"])
        totals = [torch.zeros_like(tokens) for _ in range(2)]
        torch.distributed.all_gather(totals, tokens)
        assert torch.equal(*totals), f"{split}, {route}: the processes disagree"
    # Without it one process may end while the other still talks to it, which aborts in the library below torch.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
