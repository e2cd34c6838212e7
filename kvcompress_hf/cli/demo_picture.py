"""What each head kept of a document, as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo_run import Outcome

__all__ = ["draw_heads", "text_heads"]

_SHADES = " .:-=+*#%@"


def text_heads(outcomes: list[Outcome]) -> str:
    """A line per KV head and a character per layer: the more of the document a head kept, the darker.

    Args:
        outcomes: of caches that evict.
    """
    lines = [f"What each head kept of the document, layers from left to right, from nothing to all: '{_SHADES}'"]
    for outcome in outcomes:
        kept = outcome.kept()
        for head, shares in enumerate(kept.T.tolist()):
            shades = "".join(_SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)] for share in shares)
            title = f"{outcome.title}, {kept.mean():.0%} of all" if head == 0 else ""
            lines.append(f"   {title:<24} head {head}  |{shades}|")
    return "\n".join(lines)


def draw_heads(outcomes: list[Outcome], path: Path) -> None:
    """Write a PNG: for each cache a bar per head, from the first layer to the last, of how its tokens are stored.

    Where matplotlib is missing it says so and goes on.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        print("No picture of the heads: it needs matplotlib, install kvcompress_hf[plot]")
        return
    rows = [head for outcome in outcomes for layer in outcome.tiers for head in layer]
    names = list(dict.fromkeys(name for head in rows for name in head if head[name]))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure = Figure(figsize=(11, 0.6 + 2.2 * len(outcomes)), layout="constrained")
    panels = figure.subplots(len(outcomes), 1, squeeze=False, sharex=True)[:, 0]
    for axes, outcome in zip(panels, outcomes, strict=True):
        heads = [head for layer in outcome.tiers for head in layer]
        per_layer = len(outcome.tiers[0])
        bottom = [0.0] * len(heads)
        for name in names:
            shares = [head.get(name, 0) / outcome.tokens for head in heads]
            axes.bar(range(len(heads)), shares, bottom=bottom, width=0.9, color=colours[name])
            bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
        ticks = range(0, len(heads), per_layer)
        axes.set(ylim=(0, 1), ylabel="share of tokens kept", xticks=ticks, xticklabels=[i // per_layer for i in ticks])
        axes.set_title(f"{outcome.title}: {outcome.total / outcome.dense:.1%} of the stock cache's bytes", fontsize=9)
        axes.margins(x=0.005)
    panels[-1].set_xlabel("layer (its KV heads side by side)")
    figure.legend(handles=[Patch(color=colours[name], label=name) for name in names], loc="outside right upper")
    figure.savefig(path, dpi=120)
    print(f"What each head kept: {path}")
