"""Every class of the registry, those to come included: found by its kind, documented, runs; and slips are named."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.plans import EVICT
from kvcompress_hf.recipe import Part, Recipe

ROOT = Path(__file__).parents[2]
OURS = {
    family: {kind: part for kind, part in Part.kinds(family).items() if part.__module__.startswith("kvcompress_hf.")}
    for family in ("observer", "plan")
}


@pytest.fixture(autouse=True)
def forget_the_test_classes():
    before = dict(Part._known)
    yield
    Part._known.clear()
    Part._known.update(before)


def recipe_of(family, part):
    """A recipe around one part, with whatever else it needs."""
    other = dict(observer=kvc.Recency(), plan=kvc.LowestPlan(), budget=kvc.Budget(24), when=kvc.When(every=4))
    if family == "observer" and not part.scores_decoded:
        other["when"] = kvc.When(every=4, decode=False)
    if part.kind in ("thresholds", "rate-distortion"):
        other["tiers"] = ("k8v4", "k4v2")
    return Recipe("every-kind", protect=kvc.Protect(recent=4), **{**other, family: part})


@pytest.mark.parametrize("family, kind", [(family, kind) for family in OURS for kind in OURS[family]])
def test_every_kind_runs_and_is_found_again(family, kind, tiny_llama):
    recipe = recipe_of(family, OURS[family][kind]())
    assert Recipe.from_json(recipe.to_json()) == recipe
    model = tiny_llama()
    with kvc.patched(model, recipe):
        model.generate(torch.randint(3, 64, (2, 60)), max_new_tokens=12, do_sample=False)
        report = kvc.report(model)
    assert report.statistics.plans > 0


@pytest.mark.parametrize("family", OURS)
def test_every_kind_is_public_and_on_the_page(family):
    page = (ROOT / "docs" / "recipes.md").read_text()
    for part in OURS[family].values():
        assert getattr(kvc, part.__name__, None) is part, f"{part.__name__} is missing in kvcompress_hf/__init__.py"
        assert f"`{part.__name__}" in page, f"docs/recipes.md says nothing of {part.__name__}"


def test_every_preset_is_on_the_page():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in kvc.presets() if f"`{name}`" not in page] == []


def test_a_kind_that_is_taken_is_refused():
    with pytest.raises(ValueError, match=r"Mine has the kind 'random', which is that of the observer .*simple\.Chance"):

        class Mine(kvc.Observer):
            kind = "random"

    assert Part.kinds("observer")["random"] is kvc.Chance


def test_a_kind_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match=r'Mine\.kind is 5; it must be a string.*kind = "mine"'):

        class Mine(kvc.Observer):
            kind = 5

    assert Part.kinds("observer")["random"] is kvc.Chance


def test_a_class_may_be_defined_again():
    def define():
        @dataclass(frozen=True)
        class Mine(kvc.Recency):
            kind = "test-again"

        return Mine

    first, second = define(), define()
    assert Part.kinds("observer")["test-again"] is second is not first


def test_classes_that_json_could_not_find_again_are_refused():
    class Thawed(kvc.Recency):
        kind = "test-thawed"

    @dataclass(frozen=True)
    class Nameless(kvc.Recency):
        pass

    for part, message in ((Thawed(), "Thawed must be a frozen dataclass"), (Nameless(), "Nameless has no kind")):
        with pytest.raises(TypeError, match=message):
            recipe_of("observer", part)


@dataclass(frozen=True)
class Field(kvc.Observer):
    """An observer with one field, to be spoiled."""

    kind = "test-field"

    @property
    def fields(self):
        return ("mine",)

    def observe(self, chunk):
        return {"mine": torch.ones(chunk.new.key.shape[:3])}

    def importance(self, slots):
        return slots.fields["mine"]


def spoiled(base, **members):
    """A frozen dataclass derived from another with some members replaced."""
    return dataclass(frozen=True)(type("Spoiled", (base,), {"kind": "test-spoiled", "__module__": __name__, **members}))


SLIPS = {
    "no dict": (dict(observe=lambda self, chunk: None), TypeError, r"Spoiled\.observe returned NoneType"),
    "missing field": (dict(observe=lambda self, chunk: {}), ValueError, r"fields \(none\); it must return .*mine"),
    "other field": (
        dict(observe=lambda self, chunk: {"yours": torch.ones(chunk.new.key.shape[:3])}),
        ValueError,
        r"Spoiled\.observe returned the fields yours",
    ),
    "shape": (
        dict(observe=lambda self, chunk: {"mine": torch.ones(chunk.new.key.shape[:2])}),
        ValueError,
        r"Spoiled\.observe\(\)\['mine'\] returned a tensor of shape \[1, 2\]; it must be float32 \[batch, kv_heads",
    ),
    "dtype": (
        dict(observe=lambda self, chunk: {"mine": torch.ones(chunk.new.key.shape[:3]).double()}),
        TypeError,
        r"Spoiled\.observe\(\)\['mine'\] returned a tensor of torch\.float64",
    ),
    "importance": (
        dict(importance=lambda self, slots: slots.fields["mine"][0]),
        ValueError,
        r"Spoiled\.importance returned a tensor of shape",
    ),
    "spread": (
        dict(spread=lambda self, slots: slots.positions),
        TypeError,
        r"Spoiled\.spread returned a tensor of torch\.int32",
    ),
    "no tensor": (dict(importance=lambda self, slots: 1.0), TypeError, r"Spoiled\.importance returned float"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_of_observers_are_named_and_leave_the_cache_as_it_was(slip, tiny_llama):
    members, error, message = SLIPS[slip]
    assert_refused(recipe_of("observer", spoiled(Field, **members)()), error, message, tiny_llama)


@pytest.mark.parametrize(
    "targets, error, message",
    [
        (lambda self, view: view.filled, TypeError, r"Spoiled\.targets returned a tensor of torch\.bool"),
        (lambda self, view: view.tier, ValueError, r"Spoiled\.targets returned a tensor of shape"),
        (lambda self, view: torch.where(view.filled, 1, EVICT), ValueError, r"Spoiled\.targets returned the tier 1"),
        (
            lambda self, view: torch.full_like(view.positions, EVICT).long(),
            ValueError,
            r"Spoiled\.targets evicts \d+ slots",
        ),
    ],
)
def test_slips_of_plans_are_named(targets, error, message, tiny_llama):
    assert_refused(recipe_of("plan", spoiled(kvc.LowestPlan, targets=targets)()), error, message, tiny_llama)


def assert_refused(recipe, error, message, tiny_llama):
    model = tiny_llama()
    cache = kvc.CompressedPagedCache(model.config, recipe)
    with kvc.patched(model, recipe), pytest.raises(error, match=message), torch.no_grad():
        model(torch.randint(3, 64, (1, 40)), **as_argument(model, cache))
    assert cache.get_seq_length() == 0


def test_what_a_class_raises_keeps_its_type_and_gets_its_name(tiny_llama):
    def observe(self, chunk):
        raise KeyError("mine")

    model, recipe = tiny_llama(), recipe_of("observer", spoiled(Field, observe=observe)())
    with kvc.patched(model, recipe), pytest.raises(KeyError) as caught, torch.no_grad():
        cache = kvc.CompressedPagedCache(model.config, recipe)
        model(torch.randint(3, 64, (1, 40)), **as_argument(model, cache))
    assert "Spoiled.observe" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "members, error, message",
    [
        (dict(fields=property(lambda self: ["mine"])), TypeError, r"Spoiled\.fields is \['mine'\]"),
        (dict(fields=property(lambda self: ("position",))), ValueError, "not 'position'"),
        (dict(fields=property(lambda self: tuple("abcd"))), ValueError, r"Spoiled\.fields names 4 .* room for three"),
        (dict(sum_field=property(lambda self: "sum")), ValueError, r"Spoiled\.sum_field names 'sum'"),
        (dict(describes=property(lambda self: ("norm",))), ValueError, r"Spoiled\.describes names 'norm'"),
    ],
)
def test_properties_that_contradict_each_other_are_refused_with_the_recipe(members, error, message):
    with pytest.raises(error, match=message):
        recipe_of("observer", spoiled(Field, **members)())


def test_a_missing_method_is_named():
    @dataclass(frozen=True)
    class Half(kvc.Observer):
        kind = "test-half"

        @property
        def fields(self):
            return ()

    with pytest.raises(TypeError, match="Half.*importance"):
        Half()
