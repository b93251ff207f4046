"""From a mixture file, a run and what the command line says of the proxy to a Design, or one error
line.
"""

import dataclasses
import math

import numpy as np

from megatron_commute.config import ConfigError
from megatron_commute.decide import flow_run
from megatron_commute.design import run as work
from megatron_commute.design.model import Shape
from megatron_commute.design.proxy import Proxy, Recipe, rates_of
from megatron_commute.design.text import LEAST_HELD, Source, epochs, vocabulary

LEAST_STEPS, MOST_STEPS = 125, 2000  # that --minutes may choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Shape):
    """Of the proxy; the words of --proxy. Raises ValueError for a model that cannot be built."""

    vocabulary: int = 2048
    # tokens at most: the rarest of more become one
    steps: int = 500
    # of a run
    batch: int = 30
    # sequences of a step
    lr: float = 1e-3
    # peak learning rate
    weight_decay: float = 0.1
    # of matrices
    clip: float = 1.0
    # greatest norm of a gradient


QUICK = {"layers": 1, "hidden": 32, "steps": 60, "batch": 12}


def parsed(words, quick=False):
    """Options from "layers=2,hidden=48". Raises ConfigError."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(Options)}
    found = dict(QUICK) if quick else {}
    for word in filter(None, (words or "").split(",")):
        name, _, value = word.strip().partition("=")
        if name not in fields:
            raise ConfigError(f"--proxy {word}: write NAME=VALUE with one of {', '.join(fields)}")
        try:
            found[name] = fields[name](value)
        except ValueError:
            raise ConfigError(f"--proxy {word}: write {_word(fields[name])} for {name}") from None
        if fields[name] is not str and not (math.isfinite(found[name]) and found[name] >= 0):
            raise ConfigError(f"--proxy {word}: write a number that is not negative")
    try:
        options = Options(**found)
    except ValueError as error:
        raise ConfigError(f"--proxy {error}") from None
    for name in ("steps", "batch", "lr", "clip"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--proxy {name}={getattr(options, name):g}: write a number above 0")
    if options.vocabulary < 16:
        raise ConfigError(f"--proxy vocabulary={options.vocabulary}: write at least 16")
    return options


def _word(kind):
    return {int: "a whole number", float: "a number", str: "a word"}[kind]


def design(*, config, plan, run, rates, options, untrained=(), harm=0.005, quick=False):
    """The Design of a mixture file's Config, a Plan, a config.Run and its learning rates f64[N].

    untrained: [(name, prefix)] of texts that only judge. Raises ConfigError.
    """
    _refuse(config, plan, options, harm)
    source = Source(config=config, plan=plan, seq_length=run.seq_length, untrained=tuple(untrained))
    kept, known = vocabulary(source, options.vocabulary)
    of_model = {field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)}
    sequence = min(options.sequence, run.seq_length)
    shape = Shape(**of_model | {"sequence": sequence, "vocabulary": known})
    own = tuple(rates_of(rates, options.steps, options.lr).tolist())
    recipe = Recipe(rates=own, weight_decay=options.weight_decay, clip=options.clip)
    proxy = Proxy(
        shape=shape,
        recipe=recipe,
        batch=options.batch,
        shares=tuple(plan.shares.tolist()),
        epochs=tuple(epochs(plan).tolist()),
        kept=kept,
    )
    low, high = flow_run.bounds(config, plan)
    found = work.Design(
        source=source,
        proxy=proxy,
        run_rates=tuple(np.asarray(rates).tolist()),
        target=tuple(plan.targets[0].tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        harm=harm,
        looks=(2,) if quick else work.verify.LOOKS,
    )
    _refuse_data(found)
    return found


def _refuse(config, plan, options, harm):
    if len(plan.names) < 2:
        raise ConfigError(f"{config.file}: one domain has no order; design needs at least two domains")
    if len(plan.targets) > 1:
        raise config.error("target", "each", "name the shares of one target, such as {russian: 1}")
    empty = [name for name, share in zip(plan.names, plan.shares, strict=True) if not share > 0]
    if empty:
        raise ConfigError(f"{config.file}: {empty[0]} gets no samples; give it a budget or take it out")
    if options.batch < len(plan.names):
        raise ConfigError(
            f"--proxy batch={options.batch}: write at least one for each of {len(plan.names)} domains"
        )
    if not (math.isfinite(harm) and harm > 0):
        raise ConfigError(f"--harm {harm}: write a part of the loss above 0, such as 0.005")


def _refuse_data(found):
    """What is too small, before anything is trained."""
    proxy, plan = found.proxy, found.source.plan
    pieces = found.source.seq_length // proxy.shape.sequence
    need = np.maximum(np.array(proxy.budgets), proxy.steps * proxy.each) / np.array(proxy.epochs)
    for k, name in enumerate(plan.names):
        there = plan.sizes[k] * pieces
        if math.ceil(need[k]) > there:
            steps = int(proxy.steps * there / (need[k] + 1))
            raise ConfigError(
                f"{name}: the proxy needs {math.ceil(need[k])} different sequences of {proxy.shape.sequence} "
                f"tokens to repeat them as the run does, there are {there}: write --proxy steps={steps}"
            )
        if plan.holdouts[k] * pieces < 2 * LEAST_HELD:
            raise ConfigError(
                f"{name}: {plan.holdouts[k]} held-out sequences are {plan.holdouts[k] * pieces} of "
                f"{proxy.shape.sequence} tokens, planning and judging need {2 * LEAST_HELD}: raise its "
                f"holdout to {math.ceil(2 * LEAST_HELD / pieces)}"
            )


def within(options, minutes, step_seconds, losses, processes):
    """Options whose design takes about `minutes` up to the first look, by the seconds of one step.
    Raises ConfigError where no proxy is short enough.
    """
    looks = work.verify.LOOKS[0]
    runs = 1 + 2 * losses + (4 + 2 * looks + work.COMPARED * (len(work.MORE_DATA) + work.LONGER)) / processes
    steps = int(60 * minutes / (runs * step_seconds))
    if steps < LEAST_STEPS:
        least = math.ceil(LEAST_STEPS * runs * step_seconds / 60)
        raise ConfigError(
            f"--minutes {minutes:g}: the shortest proxy takes {least}; write at least that, or --quick"
        )
    return dataclasses.replace(options, steps=min(steps, MOST_STEPS))
