"""Continue a text with a compressed cache and print what the cache took.

python examples/basic_generate.py [MODEL]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc

TINY = str(Path(__file__).parent / "models" / "kvlm-tiny")


def main(name: str = TINY) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    text = "The old house stood at the end of the lane, and nobody had lived in it " * 20
    inputs = tokenizer(text, return_tensors="pt")

    stock = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    kvc.patch(model, "k8v4")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)

    new = inputs["input_ids"].shape[1]
    print("stock:", tokenizer.decode(stock[0, new:]))
    print("k8v4: ", tokenizer.decode(out.sequences[0, new:]))
    print(kvc.cache_of(out).memory())
    print(kvc.report(model))


if __name__ == "__main__":
    main(*sys.argv[1:2])
