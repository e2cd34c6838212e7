"""Read a long document once, keep an eighth of its cache in a file, and ask questions of it in a new process.

python examples/long_document.py [--tokens 8192]

Two models answer five questions each, from the file and, to compare, with the stock cache, which reads the whole
document again for every question. The repository's tiny model has been trained on texts of up to 2,560 tokens, so it
shows whether answers survive, on 2,200 tokens. A larger Llama with random weights, which knows nothing, shows time and
bytes on 8,192 tokens.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.units import format_bytes

TINY = Path(__file__).resolve().parent / "models" / "kvlm-tiny"
RECIPE, BUDGET = "auto", 1 / 8


def make_model(which):
    if which == "tiny":
        return AutoModelForCausalLM.from_pretrained(TINY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def make_document(tokenizer, tokens):
    """Prose with two facts in it, and five questions with the beginnings of their answers."""
    rng = random.Random(0)
    sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", (TINY / "haystack.txt").read_text()))
    sentences = [sentence for sentence in sentences if 60 < len(sentence) < 200]
    facts = {
        0.3: "The pass key is 71432. Remember it. 71432 is the pass key.",
        0.7: "One of the special magic numbers for amber-window is: 7315942.",
    }
    text, used, size = [], [], len(tokenizer(" ".join(facts.values())).input_ids)
    while size < tokens:
        used.append(sentences[len(used) % len(sentences)])
        size += len(tokenizer(" " + used[-1], add_special_tokens=False).input_ids)
    text = list(used)
    for place, fact in facts.items():
        text.insert(int(place * len(text)), fact)
    questions = [
        ("\nWhat is the pass key? The pass key is", "71432"),
        (
            "\nWhat is the special magic number for amber-window mentioned in the provided text? The special magic "
            "number for amber-window mentioned in the provided text is",
            "7315942",
        ),
    ]
    for sentence in rng.sample(used[:-1], 3):  # "how did this sentence go on?"
        words = sentence.split()
        questions.append(("\n" + " ".join(words[:7]), words[7]))
    return " ".join(text), questions


def ask(model, ids, new_tokens, cache=None):
    """The new tokens, the bytes of all caches alive (forks of one share pages), and how long it took."""
    past = {} if cache is None else {"kvcompress": cache}
    began = time.perf_counter()
    out = model.generate(
        ids,
        **past,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seconds, past = time.perf_counter() - began, kvc.cache_of(out)
    if cache is None:
        held = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))
    else:
        held = past.memory().total
    return out.sequences[0, ids.shape[1] :], held, seconds


def read_and_save(which, tokens, path):
    """What is done once: prefill, compress, save."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, model_max_length=10**6)
    model = make_model(which)
    ids = tokenizer(make_document(tokenizer, tokens)[0], return_tensors="pt").input_ids
    began = time.perf_counter()
    cache = kvc.prefill(model, ids, RECIPE, budget=BUDGET)
    read = time.perf_counter() - began
    began = time.perf_counter()
    cache.save(path)
    memory = cache.memory()
    print(
        f"{which} model, {model.num_parameters() / 1e6:.1f} M parameters, {ids.shape[1]:,} tokens, {RECIPE} at "
        f"{BUDGET:g}\n  read once in {read:.2f} s into {format_bytes(memory.total)} ({memory.ratio:.1%} of the stock "
        f"cache's {format_bytes(memory.dense)}), saved in {time.perf_counter() - began:.2f} s as "
        f"{format_bytes(path.stat().st_size)}",
        flush=True,
    )


def load_and_ask(which, tokens, path, new_tokens):
    """What is done in a new process, as often as there are questions."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, model_max_length=10**6)
    model = make_model(which)
    document, questions = make_document(tokenizer, tokens)
    prompts = [tokenizer(document + question, return_tensors="pt").input_ids for question, _ in questions]
    began = time.perf_counter()
    parent = kvc.CompressedPagedCache.load(path, model)
    seconds = time.perf_counter() - began
    print(f"\n{which} model, new process: loaded {parent.get_seq_length():,} tokens in {seconds:.3f} s")
    ask(model, prompts[0][:, :64], 2)  # the first call of a process is slower: not counted
    stock = [ask(model, ids, new_tokens) for ids in prompts]
    with kvc.patched(model, parent.recipe):
        ours = [ask(model, ids, new_tokens, parent.fork()) for ids in prompts]
    right = [0, 0]
    for (question, answer), *both in zip(questions, stock, ours, strict=True):
        texts = [tokenizer.decode(tokens).strip() for tokens, _, _ in both]
        if which == "tiny":
            right = [n + text.startswith(answer) for n, text in zip(right, texts, strict=True)]
            print(f"    ...{question[-38:].strip()!r}: {answer!r}; stock {texts[0]!r}, from the file {texts[1]!r}")
    for title, runs, good in (("stock, document read again", stock, right[0]), ("from the file", ours, right[1])):
        answers = f", {good} of {len(questions)} right" if which == "tiny" else ""
        print(
            f"  {title:<27}{len(questions)} questions x {new_tokens} tokens in {sum(run[2] for run in runs):6.2f} s, "
            f"at most {format_bytes(max(run[1] for run in runs))} of cache{answers}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="length of the larger model's document")
    parser.add_argument("--tiny-tokens", type=int, default=2200, help="length of the tiny model's document")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--ask", type=Path, metavar="FOLDER", help="only ask, of the caches saved there")
    args = parser.parse_args()
    lengths = {"tiny": args.tiny_tokens, "random": args.tokens}
    if args.ask:
        for which, tokens in lengths.items():
            load_and_ask(which, tokens, args.ask / f"{which}.kvc.safetensors", args.new_tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        for which, tokens in lengths.items():
            read_and_save(which, tokens, Path(folder) / f"{which}.kvc.safetensors")
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--ask", folder], check=True)


if __name__ == "__main__":
    main()
