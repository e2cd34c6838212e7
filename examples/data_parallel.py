"""Data-parallel generation: each process has the model and its share of the prompts.

accelerate launch --num_processes 2 examples/data_parallel.py [MODEL]
"""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc

TINY = str(Path(__file__).parent / "models" / "kvlm-tiny")
PROMPTS = [
    "The captain looked at",
    "It was late, and the road",
    "Nobody had lived in the house",
    "She opened the letter",
]


def main(name: str = TINY) -> None:
    state = PartialState()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = kvc.patch(AutoModelForCausalLM.from_pretrained(name).to(state.device), "k8v4")

    said = []
    with state.split_between_processes(PROMPTS) as mine:
        for prompt in mine:
            inputs = tokenizer(prompt, return_tensors="pt").to(state.device)
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            said.append(f"process {state.process_index}: {tokenizer.decode(out[0])}")
    for line in gather_object(said):
        if state.is_main_process:
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:2])
