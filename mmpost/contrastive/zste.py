"""ZSTE: what a contrastive audio-text model knows of order without further training, in tasks of rising difficulty.

====  =================================================  ======================================================
task  question                                           right answer
====  =================================================  ======================================================
1     one sound: which class?                            its class among all classes
2A    two sounds: which classes? (the two best-scored)   both
2B    the same                                           the class heard first is the best-scored one
2C    the same                                           the class heard second is
2D    the same                                           at least one of the two is the best-scored one
3     two sounds: before, after or while?                the relation (both captions of an order are the same)
4     two sounds in order: a before b or b before a?     the order
5     likewise among true, reversed and other classes    the true caption among four
====  =================================================  ======================================================

Tasks 2 to 5 use scenes of two sounds, 4 and 5 those with an order.

Source: TeminAL, arXiv 2408.09269. Differs: its tasks are known from public reviews only, 1A and 2A/2C exactly; the rest
of this breakdown is our reconstruction, and numbers do not compare with the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmpost.contrastive.scenes import RELATIONS, Scene
from mmpost.core.seeding import generator
from mmpost.eval.stats import wilson

# Similarities of sounds and captions, float ``[sounds, captions]``.
Similarity = Callable[[Sequence[Scene], Sequence[str]], npt.NDArray[np.float64]]


def zste(similarity: Similarity, scenes: Sequence[Scene], classes: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Accuracies of all tasks.

    Args:
        similarity: Of the sounds of scenes with captions; larger is closer.
        scenes: What is played; single sounds for task 1, pairs for the others.
        classes: All classes, at least four.
        seed: Of the other classes in task 5.

    Returns:
        By task ``accuracy``, its 95 % interval ``ci``, ``n`` and ``chance``; tasks without scenes are left out.

    Raises:
        ValueError: Fewer than four classes.
    """
    if len(classes) < 4:
        raise ValueError(f"{len(classes)} classes; task 5 needs two that are not heard")
    alone = [scene for scene in scenes if scene.relation == "alone"]
    pairs = [scene for scene in scenes if scene.relation != "alone"]
    ordered = [scene for scene in pairs if scene.relation != "while"]
    out: dict[str, Any] = {}
    if alone:
        best = similarity(alone, classes).argmax(1)
        out["1"] = _share([classes[i] == scene.first for i, scene in zip(best, alone, strict=True)], 1 / len(classes))
    if pairs:
        out |= _named(similarity, pairs, classes)
        out["3"] = _relation(similarity, pairs)
    if ordered:
        out["4"] = _order(similarity, ordered)
        out["5"] = _caption(similarity, ordered, classes, generator(seed, "zste"))
    return out


def _named(similarity: Similarity, pairs: Sequence[Scene], classes: Sequence[str]) -> dict[str, Any]:
    ranks = np.argsort(-similarity(pairs, classes), axis=1)
    top = [[classes[i] for i in row[:2]] for row in ranks]
    right: dict[str, list[bool]] = {name: [] for name in ("2A", "2B", "2C", "2D")}
    for (best, second), scene in zip(top, pairs, strict=True):
        names = scene.order
        right["2A"].append({best, second} == set(names))
        right["2B"].append(best == names[0])
        right["2C"].append(best == names[1])
        right["2D"].append(best in names)
    k = len(classes)
    chance = {"2A": 2 / (k * (k - 1)), "2B": 1 / k, "2C": 1 / k, "2D": 2 / k}
    return {name: _share(flags, chance[name]) for name, flags in right.items()}


def _relation(similarity: Similarity, pairs: Sequence[Scene]) -> dict[str, Any]:
    """Of the three captions that name the classes in the order of the scene's own caption."""
    options = [[Scene(scene.first, relation, scene.second) for relation in RELATIONS] for scene in pairs]
    right = [
        best is not None and best.meaning == scene.meaning
        for best, scene in zip(_chosen(similarity, pairs, options), pairs, strict=True)
    ]
    return _share(right, 1 / len(RELATIONS))


def _order(similarity: Similarity, ordered: Sequence[Scene]) -> dict[str, Any]:
    options = [[scene, scene.reversed()] for scene in ordered]
    return _share(
        [best == one for best, one in zip(_chosen(similarity, ordered, options), ordered, strict=True)], 1 / 2
    )


def _caption(
    similarity: Similarity, ordered: Sequence[Scene], classes: Sequence[str], random: np.random.Generator
) -> dict[str, Any]:
    table = []
    for scene in ordered:
        others = [name for name in classes if name not in scene.order]
        first, second = (others[i] for i in random.choice(len(others), 2, replace=False))
        table.append(
            [
                scene,
                scene.reversed(),
                Scene(first, scene.relation, scene.second),
                Scene(scene.first, scene.relation, second),
            ]
        )
    return _share([best == one for best, one in zip(_chosen(similarity, ordered, table), ordered, strict=True)], 1 / 4)


def _chosen(similarity: Similarity, scenes: Sequence[Scene], options: Sequence[Sequence[Scene]]) -> list[Scene | None]:
    """The best-scored option of each scene; None when it is not the only one, so that a blind model is never right."""
    captions = list(dict.fromkeys(option.caption for some in options for option in some))
    place = {caption: number for number, caption in enumerate(captions)}
    out: list[Scene | None] = []
    for scores, some in zip(similarity(scenes, captions), options, strict=True):
        asked = scores[[place[option.caption] for option in some]]
        best = np.flatnonzero(asked == asked.max())
        out.append(some[int(best[0])] if len(best) == 1 else None)
    return out


def _share(right: Sequence[bool], chance: float) -> dict[str, Any]:
    return {
        "accuracy": float(np.mean(right)),
        "ci": list(wilson(sum(right), len(right))),
        "n": len(right),
        "chance": chance,
    }
