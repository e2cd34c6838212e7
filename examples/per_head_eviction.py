"""Evict to an eighth of the bytes and see which heads kept what.

python examples/per_head_eviction.py [MODEL]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc

TINY = str(Path(__file__).parent / "models" / "kvlm-tiny")


def main(name: str = TINY) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = kvc.patch(AutoModelForCausalLM.from_pretrained(name), "kv-compress", budget=1 / 8)

    filler = "The grass was green and the sky was blue, and they walked on along the river. "
    prompt = filler * 20 + "The pass key is 80251. Remember it. 80251 is the pass key. " + filler * 50
    inputs = tokenizer(prompt + "\nWhat is the pass key? The pass key is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)

    tokens = inputs["input_ids"].shape[1]
    print("answer:", tokenizer.decode(out.sequences[0, tokens:]))
    print(f"slots kept of {kvc.cache_of(out).get_seq_length()}, one line per layer, one number per KV head:")
    for layer in kvc.cache_of(out).slots():
        print("  ", *(f"{slots:6d}" for slots in layer[0].tolist()))
    print(kvc.cache_of(out).memory())


if __name__ == "__main__":
    main(*sys.argv[1:2])
