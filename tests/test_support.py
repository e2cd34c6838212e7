"""The census of model families: a handful of them, and that it tells equal from different."""

import json
import re
from pathlib import Path

import pytest
from packaging.version import Version

import kvcompress_hf as kvc
from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.cli import main, support
from kvcompress_hf.cli.support import examine
from kvcompress_hf.cli.tiny_models import families, tiny_model
from kvcompress_hf.compat import installed_version

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
MODES = ("greedy", "chunked")
# Family: what is found, and a word of the adapter or the reason.
HANDFUL = {
    "llama": ("supported", "swap"),
    "cohere2": ("supported", "interface"),
    "gemma3n_text": ("supported", "interface"),
    "aria": ("supported", "interface"),
    "deepseek_v3": ("refused", "MLA"),
    "mamba": ("refused", "recurrent"),
    "gptj": ("supported", "interface"),
    "codegen": ("supported", "interface"),
    "jetmoe": ("refused", "with a compressed cache it stops"),
    "blt": ("refused", "number of layers"),
    "pix2struct": ("refused", "encoder-decoder"),
    "glm5_next": ("not built", "ValueError"),
}
# Not written on the attention interface in transformers before 5.24.
if Version(installed_version()) < Version("5.24"):
    HANDFUL |= {"gptj": ("refused", "AttentionInterface"), "codegen": ("refused", "AttentionInterface")}


@pytest.mark.parametrize("family", HANDFUL)
def test_findings(family):
    status, word = HANDFUL[family]
    finding = examine(family, MODES)
    assert finding.status == status and word in finding.adapter + finding.note
    assert finding.equal == (MODES if status == "supported" else ()) and not finding.different


@pytest.mark.parametrize("family", HANDFUL)
def test_the_page_says_the_same(family):
    if f"transformers {installed_version()}" not in PAGE:
        pytest.skip("the page was made with another transformers")
    status, word = HANDFUL[family]
    section = re.search(rf"^## {status.capitalize()}$(.*?)(^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)
    row = re.search(rf"^\| {family} \|.*$", section, re.MULTILINE)
    assert row and (word in row.group() or status == "refused")


def test_the_page_has_every_family():
    rows = [name for name in re.findall(r"^\| (\S+) \| \w+ \|", PAGE, re.MULTILINE) if name != "family"]
    assert len(rows) > 250 and len(set(rows)) == len(rows)
    assert set(rows) >= {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi3",
        "gpt_oss",
    }


@pytest.mark.parametrize("family", ("llama", "cohere2"))
def test_a_difference_is_found(family, monkeypatch):
    """An error that the check of `patch` cannot see, here one of `generate` alone, must come out as a difference."""
    attend, generate_in, generating = CompressedPagedCache.attend, support.generate_in, []

    def wrong(self, *args, **kwargs):
        output = attend(self, *args, **kwargs)
        return output * 0.5 if generating else output

    def noting(*args):
        generating.append(True)
        try:
            return generate_in(*args)
        finally:
            generating.pop()

    monkeypatch.setattr(CompressedPagedCache, "attend", wrong)
    monkeypatch.setattr(support, "generate_in", noting)
    finding = examine(family, MODES)
    assert finding.status == "differs" and finding.different == MODES


def test_random_models_read_their_past():
    """Tokens of a model that only looks at the last one would be equal whatever the cache does."""
    import torch

    for family in ("llama", "gemma2", "bert", "gemma3n_text"):
        model = tiny_model(family)
        ids = torch.randint(3, 150, (1, 20), generator=torch.Generator().manual_seed(0))
        other = ids.clone()
        other[:, 5:10] = 7
        say = [model.generate(x, max_new_tokens=8, do_sample=False)[:, 20:].tolist() for x in (ids, other)]
        assert say[0] != say[1], family


def test_command(tmp_path, capsys):
    output, findings = tmp_path / "models.md", tmp_path / "findings.json"
    assert main(["support", "qwen3", "mamba", "--output", str(output), "--json", str(findings)]) == 0
    out = capsys.readouterr().out
    assert "qwen3  supported  swap: greedy, padded" in out and "1 supported, 1 refused" in out
    assert "| qwen3 | Qwen3ForCausalLM | swap | all |" in output.read_text()
    assert [f["status"] for f in json.loads(findings.read_text())] == ["supported", "refused"]
    assert main(["support", "no-such"]) == 1
    assert "no-such" in capsys.readouterr().err and "llama" in families()


def test_a_refusal_in_16_bits_is_found(monkeypatch):
    import torch

    patch = kvc.patch

    def narrow(model, *args, **kwargs):
        if model.dtype == torch.float16:
            raise kvc.UnsupportedModelError("not in this dtype")
        return patch(model, *args, **kwargs)

    monkeypatch.setattr(kvc, "patch", narrow)
    finding = examine("llama", ("greedy",))
    assert finding.status == "differs" and finding.different == ("float16",) and "not in this dtype" in finding.note
