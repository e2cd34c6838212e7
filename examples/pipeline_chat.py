"""A text-generation pipeline on a patched model: a padded batch, then a conversation that keeps its cache.

python examples/pipeline_chat.py [MODEL]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import kvcompress_hf as kvc

TINY = str(Path(__file__).parent / "models" / "kvlm-tiny")


def main(name: str = TINY) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = kvc.patch(AutoModelForCausalLM.from_pretrained(name), "k8v8")

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["The captain looked at", "It was late, and the road to the village was"]
    for result in pipe(texts, max_new_tokens=16, do_sample=False, batch_size=2):
        print(result[0]["generated_text"])

    # One cache for all turns: each generate call reads only what is new. A chat model would get its turns from
    # tokenizer.apply_chat_template; the tiny one of this repository knows plain text only.
    cache = kvc.CompressedPagedCache(model.config, "k8v8")
    ids = torch.empty(1, 0, dtype=torch.long)
    for said in ('"Good morning," said the captain.', '\n"And what is the news?" asked the boy.'):
        turn = tokenizer(said, return_tensors="pt", add_special_tokens=ids.numel() == 0).input_ids
        ids = model.generate(torch.cat([ids, turn], dim=1), kvcompress=cache, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(ids[0]))
    print(cache.memory())


if __name__ == "__main__":
    main(*sys.argv[1:2])
