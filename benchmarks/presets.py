"""Every preset at every budget in one table each for answers, copies and prose, from the figures of `kvcompress eval`.

    kvcompress eval --model smollm2 --probes multi-key,copy,prose --modes unseen,seen --contexts 4 --context 1500 \
        --recipes auto,kv-compress,... --budgets 1/4 --output benchmarks/results/presets_4_smollm2.json
    python benchmarks/presets.py          # prints the tables of docs/evaluation.md from benchmarks/results/presets_*

A file for each budget or more; of how many contexts they are may differ. A dagger stands where a preset is not ahead of
`streaming`, which keeps the first and the newest tokens whatever they are worth: where the 95 % interval of the
difference, paired by context, is not below zero. An exclamation mark stands where more bytes were held than 1.005 times
the budget.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcompress_hf.cli import parse_budget
from kvcompress_hf.cli.eval_tables import in_order
from kvcompress_hf.cli.figures import Ratio, interval

FIGURES = sorted((Path(__file__).parent / "results").glob("presets_*_smollm2.json"))
FLOOR = "streaming"
#: Title of each table: mode, probe.
TABLES = {
    "KL of answers, question unseen": ("unseen", "questions"),
    "KL of answers, question seen": ("seen", "questions"),
    "KL of copies": ("unseen", "copy"),
    "KL of prose": ("unseen", "prose"),
}


def cells_of(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What was measured of the one length in these files, largest budget first."""
    figures = [json.loads(path.read_text()) for path in files]
    (length,) = {length for each in figures for length in each["full"]}
    return in_order([cell for each in figures for cell in each["cells"]], int(length))


def kl_of(cell: dict[str, Any], mode: str, probe: str) -> Ratio:
    """The numbers of every context."""
    return Ratio.from_dict(cell[mode][probe]["kl"])


def number(value: float) -> str:
    """Two significant digits, no zero before the point."""
    text = f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.4f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def with_interval(cell: dict[str, Any], mode: str, probe: str) -> str:
    """KL and its interval."""
    kl = cell[mode][probe]["kl"]
    return f"{number(kl['value'])} [{number(kl['low'])}, {number(kl['high'])}]"


def marks(cell: dict[str, Any], floor: dict[str, Any] | None, mode: str, probe: str) -> str:
    """What is to be said of a figure; see above."""
    budget = parse_budget(cell["budget"]) if cell["budget"] else 1.0
    found = "!" if isinstance(budget, float) and cell["bytes"]["ratio"] > 1.005 * budget else ""
    if floor is not None and floor is not cell:
        _, high = interval(kl_of(cell, mode, probe), kl_of(floor, mode, probe))
        found += "" if high is not None and high < 0 else "†"
    return found


def table(cells: Sequence[dict[str, Any]], mode: str, probe: str) -> str:
    """One row per preset, the best at the first budget first; one column per budget."""
    cells = [cell for cell in cells if cell["budget"]]
    budgets = list(dict.fromkeys(cell["budget"] for cell in cells))
    at = {(cell["recipe"], cell["budget"]): cell for cell in cells}

    def losses(name: str) -> list[float]:
        here = [at.get((name, budget)) for budget in budgets]
        return [float("inf") if cell is None else kl_of(cell, mode, probe).value or 0.0 for cell in here]

    rows = [["", *budgets], ["---"] * (1 + len(budgets))]
    for name in sorted(dict.fromkeys(cell["recipe"] for cell in cells), key=losses):
        row = [f"`{name}`"]
        for budget in budgets:
            cell = at.get((name, budget))
            floor = at.get((FLOOR, budget))
            row.append("" if cell is None else with_interval(cell, mode, probe) + marks(cell, floor, mode, probe))
        rows.append(row)
    return in_markdown(rows)


def in_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", type=Path, default=FIGURES)
    cells = cells_of(parser.parse_args().figures)
    for title, (mode, probe) in TABLES.items():
        print(f"{title}\n\n{table(cells, mode, probe)}\n")


if __name__ == "__main__":
    main()
