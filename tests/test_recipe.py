"""Recipes: round trips, overrides, and what is refused."""

import pytest

import kvcompress_hf as kvc
from kvcompress_hf import RateDistortion, WindowScores
from kvcompress_hf.presets import resolve_recipe
from kvcompress_hf.recipe import Budget, Protect, Recipe, When


@pytest.mark.parametrize("name", kvc.presets())
def test_presets_round_trip_through_json_and_repr(name):
    recipe = kvc.get_preset(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert eval(repr(recipe), {public: getattr(kvc, public) for public in kvc.__all__}) == recipe
    assert recipe.name == name
    assert kvc.presets()[name]


def test_the_default_keeps_every_token_unless_a_budget_is_given():
    assert resolve_recipe(None) == resolve_recipe(None, budget=None) == kvc.get_preset("k8v4")
    assert not resolve_recipe(None).evicts
    assert resolve_recipe(None, budget=1 / 8) == kvc.get_preset("auto").with_overrides(budget=1 / 8)


@pytest.mark.parametrize(
    ("recipe", "stay"),
    [
        (dict(preset="auto"), (0, 1, 2)),
        (dict(preset="auto", budget=0.1), (0, 1, 2)),
        (dict(preset="auto", budget=1 / 16), (2,)),
        (dict(preset="auto", budget=1 / 16, plan={"small_tiers": 2}), (1, 2)),
        (dict(preset="auto", budget=1 / 16, protect={"prompt": True}), (0, 1, 2)),
        (dict(preset="auto", budget=64), (0, 1, 2)),
        (dict(preset="auto", budget="1MiB"), (0, 1, 2)),
        (dict(preset="auto-kvzip", budget=1 / 32), (1,)),
        (dict(preset="leankv"), (0, 1)),
        (dict(preset="k4v2"), (0, 1)),
    ],
)
def test_which_tiers_slots_stay_in(recipe, stay):
    assert resolve_recipe(recipe).resting_tiers == stay


def test_parts_combine_freely():
    recipe = resolve_recipe("kv-compress", tiers="k8v4", budget=1 / 8, protect={"sinks": 4})
    assert recipe.tiers == ("k8v4",) and recipe.budget == Budget(0.125)
    assert recipe.protect == Protect(sinks=4, recent=32)  # the parts not named stay
    assert resolve_recipe({"preset": "kv-compress", "budget": 512}).budget == Budget(512)
    assert resolve_recipe({"tiers": ["k4v2"]}).tiers == ("k4v2",)


def test_parsing_a_full_dict_restores_every_part():
    recipe = Recipe(
        "mine",
        WindowScores(8, 1, 1, exclude=3, decode=False),
        Protect(2, 8),
        Budget("3MiB"),
        RateDistortion(kappa=0.5),
        ("k8v4", "k4v2"),
        When(False, 7, False, tight=3),
        4096,
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("spec", "overrides", "error", "words"),
    [
        ("zip", {}, ValueError, "Unknown preset 'zip'.*kv-compress"),
        (3, {}, TypeError, "int"),
        ({"preset": "kv-compress", "bits": 3}, {}, ValueError, "Unknown recipe part 'bits'.*tiers"),
        ("kv-compress", {"budget": 1.5}, ValueError, r"1\.5.*\(0, 1\]"),
        ("kv-compress", {"budget": 0}, ValueError, "at least 1"),
        ("kv-compress", {"budget": 16}, ValueError, "32 are protected"),
        ("kv-compress", {"budget": "5 apples"}, ValueError, "apples"),
        ("kv-compress", {"budget": "1/8"}, ValueError, "without quotes"),
        ("kv-compress", {"budget": [0.5]}, TypeError, r"as in kvc\.Budget\(1 / 4\)"),
        ("kv-compress", {"observer": {"pool": 4}}, ValueError, "odd"),
        ("kv-compress", {"observer": {"wind": 4}}, ValueError, "Unknown argument 'wind'"),
        ("kv-compress", {"observer": {"kind": "gaze"}}, ValueError, "Unknown kind 'gaze' of observer.*window"),
        ("kv-compress", {"observer": {"half_life": 0}}, ValueError, "half_life"),
        ("snapkv", {"observer": {"half_life": 9}}, ValueError, "nothing fades"),
        ("snapkv", {"when": {"decode": True}}, ValueError, "gives them no score"),
        ("auto", {"when": {"tight": 0}}, ValueError, "tight"),
        ("snapkv", {"when": {"interval": 64}}, ValueError, "nothing is planned while decoding"),
        ("kv-compress", {"plan": {"floor": 1}}, ValueError, "floor"),
        ("kv-compress", {"plan": {"bias": [1.0]}}, ValueError, "nested"),
        ("kv-compress", {"plan": {"normalise": 1}}, ValueError, "normalise"),
        ("scissorhands", {"observer": {"count": "both"}}, ValueError, "'below' or 'above'"),
        ("expected-attention", {"observer": {"queries": 0}}, ValueError, "queries"),
        ("expected-attention", {"observer": {"value": False, "epsilon": 0.1}}, ValueError, "epsilon"),
        ("kv-compress", {"plan": None}, ValueError, "no plan"),
        ("kv-compress", {"plan": WindowScores()}, TypeError, "plan classes"),
        ("kv-compress", {"tiers": ("k8v4", "k4v2")}, ValueError, "PagePlan only keeps or evicts"),
        ("auto", {"tiers": ("k4v2", "k8v4")}, ValueError, "best first"),
        ("auto", {"budget": None}, ValueError, "needs a budget"),
        ("leankv", {"plan": {"alpha_low": 2.0}}, ValueError, "above alpha_high"),
        ("h2o", {"plan": {"protect_unsettled": 4}}, ValueError, "standard deviation"),
        ("kv-compress", {"observer": None}, ValueError, "no observer"),
        ("lossless", {"budget": 0.5}, ValueError, "no observer"),
        ("lossless", {"tiers": ("native", "k8v4")}, ValueError, "without a plan"),
        ("lossless", {"tiers": "k3v3"}, ValueError, "Unknown tier 'k3v3'"),
        ("lossless", {"tiers": ()}, TypeError, "non-empty"),
        ("lossless", {"tiers": None}, TypeError, r'as in \("k8v4",\)'),
        ("lossless", {"when": 3}, TypeError, "When"),
        ("lossless", {"page_bytes": 0}, ValueError, "page_bytes"),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(spec, overrides, error, words):
    with pytest.raises(error, match=words):
        resolve_recipe(spec, **overrides)


def test_json_that_is_no_recipe_is_refused():
    with pytest.raises(ValueError, match="JSON object"):
        Recipe.from_json("[1]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1_000, "brackets do not match, or are nested more than 8 deep"),
        ('{"observer":' * 50_000 + "0" + "}" * 50_000, "bytes long, more than 65,536"),
        ('{"observer":' * 20 + "0" + "}" * 20, "nested more than 8 deep"),
        ('{"tiers": [' + '"native",' * 2000 + '"native"]}', "values, more than 1,000|texts"),
        ('{"name": "a", "name": "b"}', "a name comes twice"),
        ('{"page_bytes": ' + "9" * 5000 + "}", "does not fit 64 bits"),
        ("[]", "A recipe is a JSON object, got list"),
        ("{", "not the JSON of a recipe"),
    ],
)
def test_json_that_is_no_recipe_is_refused_in_words(text, message):
    with pytest.raises(ValueError, match=message):
        kvc.Recipe.from_json(text)


def test_a_dict_that_is_nested_far_deeper_than_any_recipe_is_refused():
    deep = 0
    for _ in range(100_000):
        deep = {"kind": deep}
    for make in (
        lambda: kvc.Recipe.from_dict({"observer": deep}),
        lambda: kvc.get_preset("auto").with_overrides(when=deep),
    ):
        with pytest.raises(ValueError, match="nested more than 8 deep"):
            make()
