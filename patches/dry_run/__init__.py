"""The check of a patch before anyone relies on it: layer by layer, the cache against stock attention.

The stock model is run on a few tokens and what each of its attention layers got and gave is noted
([`observe_stock`]). Then the patched model is run on the same tokens ([`check_dry_run`]). In every layer two things
are compared: the queries, keys and values that reach the cache; and what the cache makes of *made-up* queries, keys
and values, next to what the stock attention function makes of the very same ones. The patched layer then goes on with
the stock layer's output, so that rounding never adds up from layer to layer: a model that is sensitive to the last bit
is judged like any other.
"""

from kvcompress_hf.patches.dry_run.check import StockNotes, check_dry_run, evaluating, observe_stock

__all__ = ["StockNotes", "check_dry_run", "evaluating", "observe_stock"]
