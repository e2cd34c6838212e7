"""Runs worlds: random steps from a seed, replay of a list, and shortening of a list that fails."""

import random
import warnings

from world import CONFIGURATIONS, OPERATIONS, World

_NAMES = list(OPERATIONS)
_WEIGHTS = [weight for weight, _ in OPERATIONS.values()]


def setting(rng):
    """What a world is made of."""
    return {
        "shape": rng.choice(CONFIGURATIONS["shape"]),
        "recipe": rng.choice(CONFIGURATIONS["recipe"]),
        "batch": rng.randint(1, 3),
        "seed": rng.randrange(2**31),
        "limit": rng.choice([0, 0, 0, 2, 4, 8]),
    }


def random_step(rng):
    """An operation and its arguments."""
    name = rng.choices(_NAMES, _WEIGHTS)[0]
    return name, {argument: rng.randint(*bounds) for argument, bounds in OPERATIONS[name][1].items()}


def replay(made_of, steps):
    """Does listed steps; returns what went wrong, `None` if nothing, and how many steps were done."""
    done = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            world = World(**made_of)
            for name, arguments in steps:
                done += 1
                world.step(name, **arguments)
            world.close()
    except Exception as error:
        return error, done
    return None, done


def kind_of(error):
    """What distinguishes one fault from another: the rule, or the exception and where in the package it came from."""
    kind = getattr(error, "kind", None)
    if kind is not None:
        return kind
    frame, at = error.__traceback__, ""
    while frame is not None:
        name = frame.tb_frame.f_code.co_filename
        if "tests" not in name:
            at = f"{name.rsplit('/', 1)[-1]}:{frame.tb_frame.f_code.co_name}"
        frame = frame.tb_next
    return f"{type(error).__name__} in {at}"


def shorten(made_of, steps, kind, tries=300):
    """A shorter list that fails in the same way."""
    size = max(1, len(steps) // 2)
    while size and tries > 0:
        at = 0
        while at < len(steps) and tries > 0:
            fewer = steps[:at] + steps[at + size :]
            tries -= 1
            error, done = replay(made_of, fewer)
            if error is not None and kind_of(error) == kind:
                steps = fewer[:done]
            else:
                at += size
        size //= 2
    return steps


def world_of(seed, number, length=40, only=None):
    """The setting and the steps of one world of a run; both follow from the seed and the number alone."""
    rng = random.Random(f"{seed}/{number}")
    made_of = {**setting(rng), **(only or {})}
    return made_of, [random_step(rng) for _ in range(length)]
