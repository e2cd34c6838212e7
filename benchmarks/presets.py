"""Every preset at every budget in one table each for answers, copies and prose, from the figures of `kvcompress eval`.

    kvcompress eval --model smollm2 --probes multi-key,copy,prose --modes unseen,seen --contexts 8 --context 1500 \
        --recipes auto,kv-compress,... --budgets 1/4,1/8,1/16,1/32,1/64 --output benchmarks/results/presets_smollm2.json
    python benchmarks/presets.py          # prints the tables of docs/evaluation.md from that file

A dagger stands where a preset is not ahead of `streaming`, which keeps the first and the newest tokens whatever they
are worth: where the 95 % interval of the difference, paired by context, is not below zero. An exclamation mark stands
where more bytes were held than 1.005 times the budget.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kvcompress_hf.cli import parse_budget
from kvcompress_hf.cli.eval_tables import in_order
from kvcompress_hf.cli.figures import Ratio, interval

FIGURES = Path(__file__).parent / "results" / "presets_smollm2.json"
FLOOR = "streaming"
#: Title of each table: mode, probe.
TABLES = {
    "KL of answers, question unseen": ("unseen", "questions"),
    "KL of answers, question seen": ("seen", "questions"),
    "KL of copies": ("unseen", "copy"),
    "KL of prose": ("unseen", "prose"),
}


def kl_of(cell: dict[str, Any], mode: str, probe: str) -> Ratio:
    """The numbers of every context."""
    return Ratio.from_dict(cell[mode][probe]["kl"])


def number(value: float) -> str:
    """Two significant digits, no zero before the point."""
    text = f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.4f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def marks(cell: dict[str, Any], floor: dict[str, Any] | None, mode: str, probe: str) -> str:
    """What is to be said of a figure; see above."""
    budget = parse_budget(cell["budget"]) if cell["budget"] else 1.0
    found = "!" if isinstance(budget, float) and cell["bytes"]["ratio"] > 1.005 * budget else ""
    if floor is not None and floor is not cell:  # paired by context
        _, high = interval(kl_of(cell, mode, probe), kl_of(floor, mode, probe))
        found += "" if high is not None and high < 0 else "†"
    return found


def table(figures: dict[str, Any], mode: str, probe: str) -> str:
    """One row per preset, the smallest sum over the budgets first; one column per budget."""
    (length,) = figures["full"]
    cells = [cell for cell in in_order(figures["cells"], int(length)) if cell["budget"]]
    budgets = list(dict.fromkeys(cell["budget"] for cell in cells))
    at = {(cell["recipe"], cell["budget"]): cell for cell in cells}
    names = sorted(
        dict.fromkeys(cell["recipe"] for cell in cells),
        key=lambda name: sum(kl_of(at[name, b], mode, probe).value or 0 for b in budgets if (name, b) in at),
    )
    rows = []
    for name in names:
        row = [f"`{name}`"]
        for budget in budgets:
            cell = at.get((name, budget))
            if cell is None:
                row.append("")
                continue
            kl = cell[mode][probe]["kl"]
            span = f"{number(kl['value'])} [{number(kl['low'])}, {number(kl['high'])}]"
            row.append(span + marks(cell, at.get((FLOOR, budget)), mode, probe))
        rows.append(row)
    header = ["", *budgets]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def uniform(figures: dict[str, Any]) -> str:
    """Presets that evict nothing: bytes, and the figures of all tables."""
    (length,) = figures["full"]
    rows = [["", "bytes", *TABLES], ["---"] * (2 + len(TABLES))]
    for cell in in_order(figures["cells"], int(length)):
        if not cell["budget"]:
            found = [cell[mode][probe]["kl"] for mode, probe in TABLES.values()]
            spans = [f"{number(kl['value'])} [{number(kl['low'])}, {number(kl['high'])}]" for kl in found]
            rows.append([f"`{cell['recipe']}`", f"{100 * cell['bytes']['ratio']:.1f} %", *spans])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="?", type=Path, default=FIGURES)
    figures = json.loads(parser.parse_args().figures.read_text())
    print(f"{uniform(figures)}\n")
    for title, (mode, probe) in TABLES.items():
        print(f"{title}\n\n{table(figures, mode, probe)}\n")


if __name__ == "__main__":
    main()
