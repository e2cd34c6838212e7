"""Which attention implementation a model runs on: setting it for the part that writes text, and finding all configs."""

from collections.abc import Callable

from transformers import PreTrainedModel

from kvcompress_hf.compat import PreTrainedConfig
from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches import interface
from kvcompress_hf.patches.support import text_config

__all__ = ["configs_of", "has_implementation", "set_implementation"]


def set_implementation(model: PreTrainedModel, name_of: Callable[[str], str] = str) -> None:
    """Sets the attention implementation of the text part; vision towers keep theirs.

    Args:
        model (`PreTrainedModel`): The model.
        name_of (`Callable[[str], str]`): From a stock implementation that has plain masks (`"sdpa"`, `"eager"`) to the
            registered one to run on; left out, it is that stock one.

    Raises:
        UnsupportedModelError: If the model refuses each of them.
    """
    text = text_config(model)
    base = interface.base_implementation(text._attn_implementation)
    # Flash and flex attention know other masks than ours; the past is read by our own kernels in any case.
    bases: tuple[str, ...] = (base,) if base in interface.BASES else interface.BASES
    names = [name_of(each) for each in bases]
    if text._attn_implementation in names:
        return
    for name in names:
        try:
            model.set_attn_implementation(
                name if text is model.config else {_sub_config_name(model.config, text): name}
            )
        except (ValueError, ImportError) as error:
            refusal: Exception | None = error
            continue
        if text._attn_implementation == name:
            return
        refusal = None
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported: its attention implementation could not be set to "
        f"{' or '.join(names)}"
    ) from refusal


def has_implementation(model: PreTrainedModel, route: str) -> bool:
    """Whether a patched model still runs on an attention implementation that its route works with.

    Args:
        model (`PreTrainedModel`): The model.
        route (`str`): `"swap"` or `"interface"`.

    Returns:
        `bool`: False after `set_attn_implementation` to another one.
    """
    name = text_config(model)._attn_implementation
    return name in (interface.BASES if route == "swap" else map(interface.interface_name, interface.BASES))


def _sub_config_name(config: PreTrainedConfig, text: PreTrainedConfig) -> str:
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            return name
    raise UnsupportedModelError(f"{type(config).__name__} hides its text config, so its attention cannot be set.")


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config of a model once, composite ones before their parts.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `list[PreTrainedConfig]`: The configs themselves.
    """
    found: dict[int, PreTrainedConfig] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            waiting += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return list(found.values())
