"""The model card: written from the configuration, the run, the sources and, once measured, the figures."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipe import RECIPES

_HEAD = """---
license: apache-2.0
language: en
library_name: transformers
---
# kvlm-eval

A Llama of {parameters:.1f} M parameters, trained from random weights so that methods for the KV cache can be compared
on heads that specialised by themselves. A test instrument, not a language model to use.
{note}
| | |
|---|---|
| Architecture | `LlamaForCausalLM`, {num_hidden_layers} layers, hidden {hidden_size}, MLP {intermediate_size}, \
{num_attention_heads} query / {num_key_value_heads} KV heads, `head_dim` {head_dim}, tied embeddings |
| Positions | RoPE, base {theta:,.0f}; trained on up to {max_position_embeddings:,} tokens |
| Tokenizer | byte-level BPE, {vocab_size:,} entries, every digit its own token, `<s>` in front |
| Training | {tokens:.0f} M tokens, {step:,} steps, {minutes:.0f} minutes; {schedule} |
| Scripts | `examples/train_eval_model` of kvcompress_hf |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```

`kvcompress eval --model {folder} --context 3900` compares recipes on it, with `haystack.txt` beside it as text.
"""

_UNMEASURED = "## Measured\n\nNothing yet: see `prove.py`.\n"
_LICENCES = """## Data and licences

The weights are under Apache-2.0. No text is shipped but `haystack.txt`, the beginning of a held-out novel in the public
domain. Licences are those that the packages' metadata name; vendored copies of other projects were left out.
{tasks:.0%} of the tokens, text between their facts included, were generated tasks: needles, keys and values,
repetitions, chains of variables, sorting, counting. The wording of the needles is that of
`kvcompress eval` - the words in their keys and the text around them are not - so that right answers
there say what the cache keeps, and nothing of how the model would take to other tasks.

| use | licence | M tokens | sources |
|---|---|---|---|"""


def write_card(folder: Path) -> None:
    """Write README.md into a model folder made by export.py.

    Args:
        folder: with config.json and training/; figures.json, written by prove.py, is used if it is there.
    """
    config = json.loads((folder / "config.json").read_text())
    run = json.loads((folder / "training" / "run.json").read_text())
    recipe = RECIPES[run["recipe"]]
    manifest = json.loads((folder / "training" / "manifest.json").read_text())
    log = [json.loads(line) for line in (folder / "training" / "train_log.jsonl").read_text().splitlines()]
    figures = folder / "figures.json"
    parts = [
        _HEAD.format(
            **config,
            folder=folder.name,
            parameters=_parameters(config) / 1e6,
            theta=config["rope_parameters"]["rope_theta"],
            tokens=run["tokens"] / 1e6,
            step=run["step"],
            minutes=run["seconds"] / 60,
            note=f"\n{recipe.note}\n" if recipe.note else "",
            schedule="learning rate down to zero" if run["finished"] else "stopped before the learning rate fell",
        ),
        _sources(manifest, sum(map(recipe.task_share, range(run["step"]))) / run["step"]),
        _curve(log),
        _figures(json.loads(figures.read_text())) if figures.is_file() else _UNMEASURED,
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _parameters(config: dict[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["head_dim"]
    attention = 2 * hidden * heads * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    return config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden


def _sources(manifest: dict[str, Any], task_share: float) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for source in manifest["sources"]:
        groups[source["stream"], source["licence"]].append(source)
    lines = [_LICENCES.format(tasks=task_share)]
    for (stream, licence), sources in sorted(groups.items()):
        tokens = sum(source["tokens"] for source in sources) / 1e6
        lines.append(f"| {stream} | {licence} | {tokens:.2f} | {', '.join(source['name'] for source in sources)} |")
    return "\n".join(lines) + "\n"


def _curve(log: list[dict[str, Any]]) -> str:
    """A few lines of the log: training loss of novels and code by position."""
    if not log:
        return ""
    chosen = sorted({round(i * (len(log) - 1) / 11) for i in range(12)})
    columns = [name for name in log[-1] if name.startswith("from ")]
    lines = [
        "## Loss while training\n",
        "Nats per token of novels and code, by position in the sequence (`training/train_log.jsonl` has every line).\n",
        f"| M tokens | length | prose | code | answers | {' | '.join(columns)} |",
        "|---" * (5 + len(columns)) + "|",
    ]
    for line in (log[i] for i in chosen):
        cells = [f"{line['tokens'] / 1e6:.1f}", str(line["length"])]
        cells += [f"{line[name]:.3f}" if name in line else "" for name in ("prose", "code", "answers", *columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, Any]) -> str:
    lines = [
        "## Measured\n",
        "`prove.py` on novels, packages and key words that were not trained on; ± standard errors.\n",
    ]
    prose = figures["losses"]["prose"]
    near, far = prose["near"], prose["far"]
    lines.append(
        f"| loss, nats per token | at {near} | at {far} | difference | at {far}, only {near} tokens of context |"
    )
    lines.append("|---|---|---|---|---|")
    for kind, found in figures["losses"].items():
        cells = [found[name] for name in ("loss_near", "loss_far", "difference", "loss_far_with_short_context")]
        lines.append(f"| {kind} | {' | '.join(f'{mean:.3f} ± {error:.3f}' for mean, error in cells)} |")
    lines.append(f"\n{figures['keys']} magic numbers of 7 digits under keys of two words, each asked:\n")
    lines.append("| context | right | 95 % interval |\n|---|---|---|")
    for length, found in figures["needles"].items():
        low, high = found["wilson95"]
        lines.append(f"| {length} | {found['right']}/{found['questions']} | {low:.0%} - {high:.0%} |")
    lines += ["", *(f"- {'reached' if ok else '**not reached**'}: {what}" for what, ok in figures["reached"].items())]
    ablation = figures["ablation"]
    full = ablation["full"]
    lines.append(
        f"\n### Which heads retrieve\n\nThe query head's output set to zero, {ablation['length']} tokens, "
        f"{full['questions']} questions; the whole model answers {full['right']}. The twelve whose answers lose "
        f"most, of {len(ablation['heads'])} (all in `figures.json`):\n"
    )
    lines.append("| layer | head | right | loss of answers | loss of prose |\n|---|---|---|---|---|")
    for head in ablation["heads"][:12]:
        rise = head["rise"]
        lines.append(
            f"| {head['layer']} | {head['head']} | {head['right']} | {rise['answers']:+.3f} | {rise['prose']:+.4f} |"
        )
    return "\n".join(lines) + "\n"
