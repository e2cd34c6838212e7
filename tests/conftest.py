"""What all tests share: one thread for the whole suite (tiny models gain nothing from two, and two that spin on a busy
machine lose), and a small Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama():
    """`tiny_llama(seed=0, **config)`: a new random Llama in evaluation mode, never ending unless it is told how."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    # Attention that looks at something, so that losing it shows.
    defaults = {**sizes, **heads, "initializer_range": 0.2, "eos_token_id": None}

    def build(seed=0, **config):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).eval()

    return build
