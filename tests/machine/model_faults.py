"""The same for whole models: a call of `generate`, `patch` or `unpatch` fails at each place; the model stays usable."""

import copy
import gc
import sys
import weakref

import inside
import torch
from faults import KINDS, Counter
from shapes import SHAPES
from world import RECIPES, Fault, check

import kvcompress_hf as kvc

IDS = torch.arange(3, 24)[None]


def look(model):
    """What a patch changes on a model: classes, instance attributes and the attention implementation."""
    modules = [
        (name, type(module).__qualname__, sorted(key for key in vars(module) if not key.startswith("_is_")))
        for name, module in model.named_modules()
    ]
    return modules, model.config._attn_implementation, model.training


class ModelScenario:
    """A tiny model, and one thing done to it.

    Args:
        name (`str`): For people.
        action (`str`): `"generate"`, `"generate on"` (with a filled cache), `"patch"` or `"unpatch"`.
        shape (`str`): Of `SHAPES`.
        recipe (`str`): Of `RECIPES`.
        dtype (`torch.dtype`): Of the model. One of 16 bits has linear layers with a kernel of ours.
    """

    def __init__(self, name, action, shape, recipe, dtype=torch.float32):
        self.name, self.action, self.recipe = name, action, RECIPES[recipe]
        self.stock = copy.deepcopy(SHAPES[shape].model()).to(dtype)
        self.kinds = ["line", "torch", "kernel before"] if action.startswith("generate") else ["line", "torch"]
        self.tokens = self._generate(self.stock)
        model = kvc.patch(copy.deepcopy(self.stock), self.recipe)
        other = kvc.patch(copy.deepcopy(self.stock), self.recipe, route="interface")
        self.looks = {"stock": look(self.stock), "patched": look(model), "by the interface": look(other)}
        self.patched_tokens = self._generate(model)

    def _generate(self, model, **more):
        return model.generate(IDS, max_new_tokens=3, do_sample=False, **more).tolist()

    def prepare(self):
        """The model before the action, and a cache for those that go on with one."""
        model, cache = copy.deepcopy(self.stock), None
        if self.action != "patch":
            kvc.patch(model, self.recipe, check=False)
        if self.action == "generate on":
            cache = kvc.prefill(model, IDS[:, :-4], self.recipe)
        return model, cache

    def act(self, model, cache):
        """The action."""
        if self.action == "patch":
            kvc.patch(model, self.recipe)
        elif self.action == "unpatch":
            kvc.unpatch(model)
        elif cache is None:
            self._generate(model)
        else:
            self._generate(model, past_key_values=cache)

    def count(self, kind):
        """How many places of a kind the action passes."""
        counter, prepared = Counter(), self.prepare()
        with KINDS[kind][0](counter, self.recipe):
            self.act(*prepared)
        return counter.passed

    def fail(self, kind, at):
        """Fails at a place and judges what is left; as [`faults.Scenario.fail`]."""
        watch, error = KINDS[kind]
        prepared = list(self.prepare())
        counter = Counter(error("injected"), at)
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        try:
            gc.disable()
            with watch(counter, self.recipe):
                self.act(*prepared)
        except BaseException as caught:
            if counter.where is None:
                raise
            caught.__traceback__ = None
        finally:
            gc.enable()
            sys.unraisablehook = hook
        if counter.where is None:
            return "", "not reached"
        counter.error.__traceback__ = counter.error.__context__ = counter.error.__cause__ = None
        try:
            return counter.where, self.judge(prepared)
        except Fault as fault:
            fault.where = counter.where
            raise
        except Exception as wrong:
            fault = Fault("later calls fail", f"{type(wrong).__name__}: {str(wrong)[:160]}")
            fault.where = counter.where
            raise fault from None

    def judge(self, prepared):
        """The model is stock or patched, generates right either way, and can be unpatched without a trace."""
        model, cache = prepared
        prepared.clear()
        now = look(model)
        ended = next((name for name, wanted in self.looks.items() if wanted == now), None)
        if ended == "by the interface" and self.action == "patch":
            ended = "patched"  # what `patch` does where swapping fails, and says so
        if self.action.startswith("generate"):
            check(ended == "patched", "model changed")
        check(ended is not None, "model between stock and patched", lambda: _first_difference(now, self.looks))
        watched = [] if cache is None else [weakref.ref(arena) for arena in inside.arenas(cache)]
        if cache is not None:
            self._judge_cache(model, cache)
        if ended == "stock":
            kvc.patch(model, self.recipe)
        check(self._generate(model) == self.patched_tokens, "wrong answers of the model")
        kvc.unpatch(model)
        check(look(model) == self.looks["stock"], "unpatch leaves a trace")
        check(self._generate(model) == self.tokens, "wrong answers of the stock model")
        del cache
        gc.collect()
        check(all(ref() is None for ref in watched), "arena kept alive")
        return "after" if (ended == "patched") == (self.action != "unpatch") else "before"

    def _judge_cache(self, model, cache):
        """A cache that was given to the call goes on from what it says it has seen, or says what to do."""
        seen = cache.get_seq_length()
        whole = torch.tensor(self.patched_tokens)
        if seen < IDS.shape[1] - 4:
            check(seen == 0, "length", f"{seen}")
            return
        if seen >= whole.shape[1]:
            return
        for _ in range(2):
            try:
                out = model.generate(
                    whole[:, : max(seen + 1, IDS.shape[1])], past_key_values=cache, max_new_tokens=1, do_sample=False
                )
            except RuntimeError as error:
                check("half way" in str(error) or "reset()" in str(error), "unclear error", str(error)[:120])
                if "reset()" in str(error):
                    return
                seen = cache.get_seq_length()
                continue
            if out.shape[1] <= whole.shape[1]:
                check(out.tolist()[0] == whole[0, : out.shape[1]].tolist(), "wrong answers of the cache")
            return
        raise Fault("unclear error", "the cache refuses again and again")


def _first_difference(now, looks):
    said = []
    for name, wanted in looks.items():
        for ours, theirs in zip(now[0], wanted[0], strict=False):
            if ours != theirs:
                said.append(f"unlike {name}: {ours[0] or 'model'} is {ours[1]} with {set(ours[2]) ^ set(theirs[2])}")
                break
        else:
            said.append(f"unlike {name}: {now[1]}, training {now[2]}")
    return "; ".join(said)


def scenarios():
    """All of them, by name."""
    many = [
        ("generate", "generate", "llama", "lossless"),
        ("generate on a cache", "generate on", "llama", "lossless"),
        ("generate on a cache of a mixed model", "generate on", "mixed", "lossless"),
        ("patch", "patch", "llama", "lossless"),
        ("patch a mixed model", "patch", "mixed", "lossless"),
        ("unpatch", "unpatch", "llama", "lossless"),
        ("unpatch a mixed model", "unpatch", "mixed", "lossless"),
        ("generate in bfloat16", "generate", "llama", "lossless", torch.bfloat16),
        ("patch in bfloat16", "patch", "llama", "lossless", torch.bfloat16),
        ("unpatch in bfloat16", "unpatch", "llama", "lossless", torch.bfloat16),
    ]
    return {each[0]: each for each in many}
