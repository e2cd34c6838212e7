"""The contract with transformers, and what `patch` makes of it on a version it was not tested with."""

import logging

import pytest
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from kvcompress_hf.cli import main
from kvcompress_hf.compat import TESTED
from kvcompress_hf.compat import logging as stock_logging
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches import contract, is_patched, patch, swap
from kvcompress_hf.patches.core import contract_results


@pytest.mark.parametrize("item", contract.CONTRACT, ids=lambda item: item.name.replace(" ", "-"))
def test_contract(item):
    [(name, holds, what)] = contract_results((item,))
    assert name == item.name and what
    assert holds, what


def test_doctor_runs_it(capsys, monkeypatch):
    monkeypatch.setattr(contract, "CONTRACT", contract.CONTRACT[:3])
    assert main(["doctor", "--transformers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * (len(lines) - 1)
    assert "the contract holds" in lines[-1]


@pytest.fixture
def version(monkeypatch):
    """`version("5.99.0")`: that version seems to be installed, and its contract has not been run yet."""

    def pretend(name):
        monkeypatch.setattr(contract, "installed_version", lambda: name)

    contract._broken_items.cache_clear()
    stock_logging.get_logger(contract.__name__).warning_once.cache_clear()
    yield pretend
    contract._broken_items.cache_clear()


def test_an_untested_version_that_holds_is_said_once(version, build_model, caplog):
    version("5.99.0")
    with caplog.at_level(logging.WARNING, "kvcompress_hf"):
        assert is_patched(patch(build_model("llama")))
        assert is_patched(patch(build_model("qwen3")))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["kvcompress_hf was not tested with transformers 5.99.0; its contract holds."]
    assert contract._broken_items.cache_info().misses == 1


@pytest.mark.parametrize("name", ("5.22.1", "4.57.0", "6.0.0"))
def test_a_broken_contract_is_named(name, version, build_model, snapshot, monkeypatch):
    version(name)
    monkeypatch.setattr(contract, "check_contract", lambda install, swapped: [("cache methods", False, "no crop")])
    model = build_model("llama")
    before = snapshot(model)
    with pytest.raises(UnsupportedFeatureError, match=rf"{name} .*cache methods \(no crop\).*{TESTED[0]}"):
        patch(model)
    assert snapshot(model) == before and not is_patched(model)


def _renamed(self, key, value, index):
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "item"),
    [
        (Cache, "update", _renamed, "cache methods"),
        (contract.CacheLayerMixin, "__abstractmethods__", frozenset({"merge"}), "cache methods"),
        (contract, "layer_windows", lambda config: [None, None], "sliding windows"),
        (GenerationMixin, "_prefill", lambda self, tokens: None, "generation methods"),
        (GenerationMixin, "_prepare_cache_for_generation", lambda self, *args: None, "cache handed over"),
        (contract, "generate_argument", lambda: "memory", "cache handed over"),
        (contract, "ALL_MASK_ATTENTION_FUNCTIONS", {}, "attention interface"),
    ],
)
def test_each_item_can_fail(owner, attribute, value, item, monkeypatch):
    monkeypatch.setattr(owner, attribute, value)
    items = tuple(each for each in contract.CONTRACT if not each.name.startswith("end to end"))
    broken = {name: what for name, holds, what in contract_results(items) if not holds}
    assert broken.get(item)


def test_wrong_tokens_break_it(monkeypatch):
    monkeypatch.setattr(swap, "_paged_attention", lambda module, cache, states, *rest: (states, None))
    results = {name: holds for name, holds, _ in contract_results(contract.CONTRACT[-2:])}
    assert results == {"end to end, swap route": False, "end to end, interface route": True}
