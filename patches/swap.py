"""Replacing attention modules by paged ones, and putting the originals back.

A paged module is another view of the stock module: it holds the very same dicts of parameters, buffers,
submodules and hooks, so whatever moves, offloads, shards or wraps one does it to both.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import ALL_ATTENTION_FUNCTIONS, find_cache
from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches.call import as_autocast, check_call

__all__ = ["PagedForward", "paged_view", "paged_views", "restore_originals", "swap_modules"]


def paged_views(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    """Makes a paged view of each module of exactly a class in `classes`; the model does not change yet.

    Args:
        model (`nn.Module`): The model.
        classes (`dict[type, type]`): Stock class to paged class.

    Returns:
        `list[tuple[nn.Module, nn.Module]]`: (paged, original) each.

    Raises:
        UnsupportedModelError: If something other than accelerate replaced a module's `forward`.
    """
    return [
        (paged_view(module, classes[type(module)], name), module)
        for name, module in model.named_modules()
        if type(module) in classes
    ]


def swap_modules(model: nn.Module, views: list[tuple[nn.Module, nn.Module]]) -> None:
    """Replaces modules by paged views of them.

    Args:
        model (`nn.Module`): The model.
        views (`list[tuple[nn.Module, nn.Module]]`): From [`paged_views`].
    """
    _replace_children(model, {original: paged for paged, original in views})


def restore_originals(model: nn.Module, swapped: list[tuple[nn.Module, nn.Module]]) -> None:
    """Undoes [`swap_modules`], keeping hooks, training mode and placement that were set since.

    Args:
        model (`nn.Module`): The model.
        swapped (`list[tuple[nn.Module, nn.Module]]`): What `swap_modules` replaced, or a part of it.
    """
    for paged, original in swapped:
        state = dict(paged.__dict__)
        _retarget_forward(state, paged, original)
        # Never empty in between: another thread may still be inside the original's forward.
        original.__dict__.update(state)
        for name in original.__dict__.keys() - state.keys():
            del original.__dict__[name]
    _replace_children(model, dict(swapped))


def paged_view(module: nn.Module, paged_class: type[nn.Module], name: str = "attention") -> nn.Module:
    """A paged module over the state of a stock one.

    Args:
        module (`nn.Module`): The stock attention module; left as it is.
        paged_class (`type[nn.Module]`): A subclass of its class that adds only a `forward`.
        name (`str`): What to call the module in an error.

    Returns:
        `nn.Module`: The paged module.

    Raises:
        UnsupportedModelError: If something other than accelerate replaced the module's `forward`.
    """
    state = dict(module.__dict__)
    if not _retarget_forward(state, module, paged := paged_class.__new__(paged_class)):
        raise UnsupportedModelError(
            f"The forward of {name} ({type(module).__name__}) was replaced by {state['forward']!r}; patch the model "
            "first and apply that change afterwards, or undo it."
        )
    paged.__dict__.update(state)
    return paged


def _retarget_forward(state: dict[str, Any], old: nn.Module, new: nn.Module) -> bool:
    """Points accelerate's `forward` in `state` from `old` to `new`; False if it is somebody else's."""
    if "forward" not in state:
        return True
    forward, bound = state["forward"], types.MethodType(type(new).forward, new)
    if "_old_forward" in state:
        if not (
            isinstance(forward, functools.partial) and forward.args == (old,) and _is_own(state["_old_forward"], old)
        ):
            return False
        state["_old_forward"] = bound
        state["forward"] = functools.update_wrapper(functools.partial(forward.func, new), bound)
        return True
    # What accelerate leaves behind when it removes its hook.
    if not _is_own(forward, old):
        return False
    state["forward"] = bound
    return True


def _is_own(method: Any, module: nn.Module) -> bool:
    return (
        isinstance(method, types.MethodType) and method.__self__ is module and method.__func__ is type(module).forward
    )


def _replace_children(model: nn.Module, views: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in views:
                parent._modules[name] = views[child]


class PagedForward(nn.Module):
    """The `forward` of attention modules of Llama's shape that talk to a [`CompressedPagedCache`] directly.

    To be inherited from before the stock class, which keeps everything else and serves other caches. Made by [`patch`]
    over the state of a stock module, never from a config.
    """

    #: The family's `apply_rotary_pos_emb` and `eager_attention_forward`.
    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    eager: ClassVar[Callable[..., tuple[Tensor, Tensor | None]]]
    #: Names of the modules that norm the heads of queries and keys, where the family has them.
    norms: ClassVar[tuple[str, str] | None] = None

    def window(self) -> int | None:
        """The layer's sliding window in tokens.

        Returns:
            `int` or `None`: `None` for full attention.
        """
        return None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock `forward`; the cache is whichever argument is a [`CompressedPagedCache`].

        Args:
            hidden_states (`Tensor`): `[batch, tokens, hidden]`.
            position_embeddings (`tuple[Tensor, Tensor]`): cos and sin, `[batch, tokens, head_dim]`.
            attention_mask (`Tensor`, *optional*): What transformers made for the new tokens, `[batch, 1, tokens,
                tokens]`.
            args: The other arguments by position; at most the cache.
            kwargs: The other arguments by name, the cache among them.

        Returns:
            `tuple[Tensor, Tensor | None]`: `[batch, tokens, hidden]`, and the attention weights if the stock path
            returns them.

        Raises:
            UnsupportedFeatureError: For arguments the cache does not know, or attention dropout.
            ValueError: Without position embeddings, or with two different caches.
        """
        cache = find_cache((*args, *kwargs.values()), CompressedPagedCache)
        if cache is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)  # type: ignore[misc]
        rest = {name: value for name, value in kwargs.items() if value is not cache}
        return _paged_attention(self, cache, hidden_states, position_embeddings, attention_mask, self.window(), rest)


def _paged_attention(
    module: Any,
    cache: CompressedPagedCache,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    if position_embeddings is None:
        raise ValueError(f"{type(module).__name__} needs position_embeddings=(cos, sin).")
    dropout = module.attention_dropout if module.training else 0.0
    check_call(module, dropout, kwargs)
    input_shape = hidden_states.shape[:-1]
    # Head counts come from the projections: under tensor parallelism this rank has only its own heads.
    hidden_shape = (*input_shape, -1, module.head_dim)
    query = module.q_proj(hidden_states).view(hidden_shape)
    key = module.k_proj(hidden_states).view(hidden_shape)
    value = module.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    if module.norms is not None:
        query, key = (getattr(module, name)(heads) for name, heads in zip(module.norms, (query, key), strict=True))
    cos, sin = position_embeddings
    query, key = module.rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)

    output = _attend(module, cache, query, key, value, attention_mask, sliding_window, kwargs)
    return module.o_proj(output.reshape(*input_shape, -1)), None


@torch.compiler.disable
def _attend(
    module: Any,
    cache: CompressedPagedCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    def dense() -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, module.eager)
        # For sdpa and eager the mask carries the window; the argument is for implementations without masks.
        window = {} if sliding_window is None else {"sliding_window": sliding_window}
        return function(
            module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **window, **kwargs
        )[0]

    return cache.attend(
        module.layer_idx,
        *as_autocast(query, key, value),
        attention_mask,
        scaling=module.scaling,
        dense=dense,
        sliding_window=sliding_window,
    )
