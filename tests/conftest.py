"""What all tests share: one thread for the whole suite (tiny models gain nothing from two, and two that spin on a busy
machine lose), a small Llama, and the walk that honest bytes are checked by."""

import pytest
import torch

_HOLDS_NO_TENSOR = (str, bytes, int, float, type, torch.dtype, torch.device, torch.nn.Module)


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
        from transformers import LlamaConfig, LlamaForCausalLM  # not for tests of kernels alone

        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).eval()

    return build


def _held_bytes(*roots):
    seen, storages, queue = set(), {}, list(roots)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, _HOLDS_NO_TENSOR):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += list(item)
        else:
            queue += list(getattr(item, "__dict__", {}).values())
            slots = (name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()))
            queue += [getattr(item, name) for name in slots if hasattr(item, name)]
    return sum(storages.values())


@pytest.fixture(scope="session")
def held_bytes():
    """`held_bytes(*roots)`: bytes of every distinct tensor storage reachable through attributes and containers."""
    return _held_bytes
