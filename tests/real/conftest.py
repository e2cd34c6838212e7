"""Real pretrained models, each fetched once to the user's cache directory, and held-out prose for them to read."""

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress_hf.cli.fetch import REAL_MODELS, fetch
from kvcompress_hf.errors import ModelNotFetchedError

#: A novel of 1902 that no setting was chosen on.
PROSE = Path(__file__).parents[2] / "examples" / "models" / "kvlm-tiny" / "haystack.txt"
#: KVCOMPRESS_ACCEPT_TERMS=gemma3 lets the tests fetch a model that is under terms of its own.
ACCEPTED = os.environ.get("KVCOMPRESS_ACCEPT_TERMS", "").split(",")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def load():
    """Loads a real model and its tokenizer, or skips with the reason why it cannot be had."""

    def load(name, dtype):
        try:
            folder = fetch(REAL_MODELS[name], accept_terms=name in ACCEPTED)
        except ModelNotFetchedError as error:
            pytest.skip(str(error))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.generation_config.eos_token_id = None  # as many tokens as are asked for
        return model, AutoTokenizer.from_pretrained(folder)

    return load


@pytest.fixture(scope="session")
def prose():
    """Cuts tokens of prose out of the novel."""

    def prose(tokenizer, count, skip=4000):
        text = PROSE.read_text(encoding="utf-8")[skip : skip + 8 * count]
        ids = tokenizer(text[text.index(". ") + 2 :], return_tensors="pt").input_ids
        assert ids.shape[1] >= count
        return ids[:, :count]

    return prose
