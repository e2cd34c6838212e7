"""Answer many prompts on several devices: each process has the whole model and takes its share of the prompts.

accelerate launch --num_processes 2 examples/split_between_processes.py                    # two GPUs
accelerate launch --num_processes 2 --multi_gpu examples/split_between_processes.py --cpu  # two processes on the CPU
python examples/split_between_processes.py                                                 # one process

(accelerate's own --cpu starts more than one process only through MPI; --multi_gpu starts them, whatever they run on.)
"""

import argparse
import json
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc

TINY = Path(__file__).resolve().parent / "models" / "kvlm-tiny"
FILLER = "The grass was green and the sky was blue, and they walked on along the river. "


def make_prompts(count):
    return [
        FILLER * (2 + 3 * i)
        + f"The pass key is {10007 * (i + 1)}. Remember it. {10007 * (i + 1)} is the pass key. "
        + FILLER * 4
        + "\nWhat is the pass key? The pass key is"
        for i in range(count)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY), help="folder or hub id")
    parser.add_argument("--recipe", default="k8v4", help="a preset")
    parser.add_argument("--prompts", type=int, default=6, help="how many")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--output", type=Path, help="write the answers as JSON")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model)
    # Only now: modules that loading imports would keep the process group, and its threads, until the very end of the
    # process, where such a thread may abort it.
    state = PartialState(cpu=args.cpu)
    kvc.patch(model.to(state.device), args.recipe)

    answers = []
    # A list is split, so shares may differ by one; no process needs to pad its share to another's length.
    with state.split_between_processes(make_prompts(args.prompts)) as share:
        if share:
            inputs = tokenizer(share, return_tensors="pt", padding=True).to(state.device)
            out = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers = [
                {"process": state.process_index, "tokens": row.tolist(), "text": tokenizer.decode(row)} for row in new
            ]
    answers = gather_object(answers)  # in the order of the prompts
    if state.is_main_process:
        for answer in answers:
            print(f"process {answer['process']}: {answer['text']!r}")
        print(kvc.report(model))
        if args.output:
            args.output.write_text(json.dumps(answers))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
