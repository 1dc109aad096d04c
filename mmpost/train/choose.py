"""From the loss section of a configuration to a ``Method``: constants of the preset, then what the user replaces."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmpost.config.schema import LossSection
from mmpost.core.errors import MmpostError
from mmpost.train.advantages import ADVANTAGES
from mmpost.train.denominators import DENOMINATORS
from mmpost.train.method import Method
from mmpost.train.mismatch import Mismatch
from mmpost.train.parts import Kl, Parts
from mmpost.train.soft import Soft
from mmpost.train.stabilisers import STABILISERS, Clip

_EPSILONS = ("epsilon", "epsilon_high")


def choose(name: str, preset: Callable[..., Method], section: LossSection, *, own_engine: bool = True) -> Method:
    """The method that a configuration asks for.

    Args:
        name: Of the preset, for messages.
        preset: Function of ``mmpost.algos`` or of the user.
        section: ``loss`` of the configuration.
        own_engine: Whether completions come from the weights that train, with the same code.

    Raises:
        MmpostError: MMP-C035 for constants that the preset does not have or that have the wrong type, MMP-C036 for
            parts that do not go together.
    """
    method = _made(name, preset, section)
    if method.rollout is not None:
        method = replace(method, rollout=_replaced(method.rollout, section, own_engine))
    if method.demo is not None and method.rollout is None:
        method = replace(method, demo=_replaced(method.demo, section, own_engine))
    if section.advantage is not None and method.rollout is not None:
        method = replace(method, advantage=ADVANTAGES[section.advantage]())
    if section.entropy_beta is not None:
        others = tuple(soft for soft in method.soft if soft.kind != "entropy")
        rows: typing.Literal["rollout", "demo"] = "demo" if method.rollout is None else "rollout"
        bonus = (Soft("entropy", section.entropy_beta, rows=rows),) if section.entropy_beta else ()
        method = replace(method, soft=others + bonus)
    _check(name, method, section)
    return method


def _made(name: str, preset: Callable[..., Method], section: LossSection) -> Method:
    """The preset with its constants."""
    known = inspect.signature(preset).parameters
    given = dict(section.args)
    for epsilon in _EPSILONS:
        value = getattr(section, epsilon)
        if value is None or (epsilon not in known and "clip" in (section.stabilise or [])):
            continue
        if epsilon not in known:
            raise MmpostError(
                "MMP-C035",
                f"loss.{epsilon} is {value}, but '{name}' does not clip with it.",
                f"Leave it out, or set loss.stabilise=[clip]. {_valid(name, known)}",
            )
        given[epsilon] = value
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = []
    else:
        unknown = [key for key in given if key not in known]
    if unknown:
        raise MmpostError("MMP-C035", f"loss.args: '{name}' has no constant '{unknown[0]}'.", _valid(name, known))
    hints = typing.get_type_hints(preset)
    values = {key: _read(name, key, value, hints.get(key, Any), known) for key, value in given.items()}
    missing = [key for key, p in known.items() if p.default is p.empty and key not in values and p.kind not in (2, 4)]
    if missing:
        raise MmpostError("MMP-C035", f"loss.args: '{name}' needs the constant '{missing[0]}'.", _valid(name, known))
    try:
        method = preset(**values)
    except ValueError as error:
        raise MmpostError("MMP-C035", f"loss.args: '{name}' does not take these constants: {error}.") from error
    if not isinstance(method, Method):
        raise MmpostError(
            "MMP-C035",
            f"loss.preset: '{name}' gave a {type(method).__name__}.",
            "Return a mmpost.train.method.Method from the function.",
        )
    return method


def _read(name: str, key: str, value: Any, hint: Any, known: typing.Mapping[str, inspect.Parameter]) -> Any:
    """The value as the preset's annotation wants it; numbers are not made of text or of truth values."""
    try:
        if isinstance(value, bool) and bool not in (hint, *typing.get_args(hint)) and hint is not Any:
            raise TypeError
        # A number written as 3 may stand for 3.0, but "3" may not.
        adapter = TypeAdapter(hint, config=ConfigDict(strict=not isinstance(value, list)))
        return adapter.validate_python(value)
    except (ValidationError, TypeError) as error:
        wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise MmpostError(
            "MMP-C035", f"loss.args: '{key}' of '{name}' is {value!r}, but must be {wanted}.", _valid(name, known)
        ) from error


def _valid(name: str, known: typing.Mapping[str, inspect.Parameter]) -> str:
    """What may be set, with the preset's own values."""
    shown = [key if p.default is p.empty else f"{key}={p.default!r}" for key, p in known.items()]
    return f"Constants of '{name}': {', '.join(shown)}." if shown else f"'{name}' has no constants."


def _replaced(parts: Parts, section: LossSection, own_engine: bool) -> Parts:
    """The parts with the user's choices in place of the preset's."""
    chosen: dict[str, Any] = {}
    if section.aggregate is not None:
        chosen["aggregate"] = section.aggregate
    if section.denominator is not None:
        chosen["denominator"] = DENOMINATORS[section.denominator]
    if section.stabilise is not None:
        kept = {type(part): part for part in parts.stabilise}
        made = []
        for name in section.stabilise:
            kind: Any = STABILISERS[name]
            if kind in kept:
                # The preset's own constants stay, for example its clip distances.
                made.append(kept[kind])
            elif kind is Clip:
                epsilon = 0.2 if section.epsilon is None else section.epsilon
                made.append(Clip(epsilon, section.epsilon_high))
            else:
                made.append(kind())
        chosen["stabilise"] = tuple(made)
    changes = {name: value for name, value in section.kl.model_dump().items() if value is not None}
    if section.kl.kl == "k1":
        raise MmpostError(
            "MMP-C036",
            "loss.kl.kl is 'k1', whose gradient in the loss is 0 on average: it would hold nothing.",
            "Use loss.kl.kl=k2, or k1_reward to take it off the reward.",
        )
    if "kl" in changes:
        changes["estimator"] = changes.pop("kl")
    if "beta" in changes and "final_beta" not in changes:
        # A weight of one's own is constant unless its end is given, too.
        changes["final_beta"] = None
    kl: Kl = replace(parts.kl, **changes)
    given = section.mismatch
    mismatch = parts.mismatch
    if given.correction is not None:
        mismatch = Mismatch(given.correction, given.cap, given.low)
    elif not own_engine and mismatch.mode == "off":
        mismatch = Mismatch("token_tis", given.cap, given.low)
    return replace(parts, kl=kl, mismatch=mismatch, **chosen)


def _check(name: str, method: Method, section: LossSection) -> None:
    """Refuse what cannot mean anything.

    Raises:
        MmpostError: MMP-C036.
    """
    for parts in method.parts:
        if getattr(parts.denominator, "by_row", False) and parts.aggregate in ("token", "micro_token"):
            raise MmpostError(
                "MMP-C036",
                f"loss.aggregate is '{parts.aggregate}', but the ratio 'seq' belongs to whole rows: long rows would "
                "count more than short ones.",
                "Use loss.aggregate=seq_mean, or seq_sum.",
            )
        if parts.kl.estimator == "k1_reward" and parts.kl.to == "teacher":
            raise MmpostError("MMP-C036", "loss.kl.kl is 'k1_reward' with a teacher.", "Use loss.kl.kl=k2.")
    if (method.asks("teacher") or method.compares("teacher")) and section.teacher is None:
        raise MmpostError("MMP-C036", f"'{name}' needs a teacher.", "Set loss.teacher=FOLDER.")
    if section.teacher is not None and not (method.asks("teacher") or method.compares("teacher")):
        raise MmpostError(
            "MMP-C036",
            f"loss.teacher is set, but '{name}' has no term with a teacher.",
            "Leave it out, use loss.preset=kdrl, or set loss.kl.to=teacher and loss.kl.beta.",
        )
