"""The method of a run from its configuration, and the frozen models that it compares the policy with."""

from __future__ import annotations

import copy
from collections.abc import Callable

from mmpost.algos import ALGOS
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.models.load import LoadedModel, load
from mmpost.models.policy import Policy
from mmpost.train.choose import choose
from mmpost.train.contrast import Contrast
from mmpost.train.method import Method
from mmpost.train.reference import Frozen


def open_method(config: SFTConfig | GRPOConfig) -> Method:
    """The method that ``loss`` asks for.

    Raises:
        MmpostError: MMP-C006 or MMP-C007 for an unknown preset, MMP-C033 when it does not fit the command, MMP-C035
            and MMP-C036 as in ``choose``.
    """
    section = config.loss
    name = section.preset or config.command
    preset = Catalog("algos", ALGOS).get(name)
    own_engine = not isinstance(config, GRPOConfig) or config.rollout.engine != "vllm"
    method = choose(name, preset, section, own_engine=own_engine)
    if isinstance(method.draw, Contrast) and not own_engine:
        raise MmpostError(
            "MMP-C036",
            f"'{name}' needs completions of films with shuffled frames, which rollout.engine=vllm cannot make: it "
            "decodes the files itself.",
            "Set rollout.engine=native.",
        )
    if isinstance(config, SFTConfig):
        if section.advantage not in (None, "ones"):
            raise MmpostError(
                "MMP-C033",
                f"loss.advantage is '{section.advantage}', but demonstrations have no rewards.",
                "Use mmpost grpo, or loss.advantage=ones.",
            )
        if method.rollout is not None or method.demo is None:
            raise MmpostError(
                "MMP-C033",
                f"loss.preset is '{name}', which trains on completions; mmpost sft makes none.",
                "Use mmpost grpo.",
            )
    elif method.rollout is None:
        raise MmpostError(
            "MMP-C033",
            f"loss.preset is '{name}', which trains on demonstrations alone.",
            "Use mmpost sft.",
        )
    return method


def open_reference(model: LoadedModel, method: Method, policy: Callable[[], Policy]) -> Frozen | None:
    """The starting weights, where the method compares with them.

    Args:
        model: As it starts.
        method: Of the run.
        policy: Gives the policy that trains, which may be opened again from a checkpoint later.
    """
    if not (method.asks("reference") or method.compares("reference")):
        return None
    if model.fresh_lora:
        return Frozen.under_lora(policy)
    return Frozen.copy_of(copy.deepcopy(model.policy))


def open_teacher(config: SFTConfig | GRPOConfig, model: LoadedModel, method: Method) -> Frozen | None:
    """The teacher, where the method has one.

    It reads the student's token ids and media, so that both must be encoded alike.

    Raises:
        MmpostError: MMP-C037 when teacher and student do not read the same ids; what ``load`` raises.
    """
    if config.loss.teacher is None or not (method.asks("teacher") or method.compares("teacher")):
        return None
    section = config.model.model_copy(update={"model_name_or_path": config.loss.teacher, "revision": None})
    teacher = load(
        section,
        peft=None,
        media=config.data.media,
        max_length=config.data.max_length,
        device=model.policy.device,
    )
    _check_alike(teacher, model, whole=method.compares("teacher"))
    return Frozen.copy_of(teacher.policy)


def _check_alike(teacher: LoadedModel, student: LoadedModel, *, whole: bool) -> None:
    """Refuse a teacher that would read something else than the student wrote."""
    different = None
    theirs, ours = teacher.adapter, student.adapter
    vocabularies = [a.processor.tokenizer.get_vocab() for a in (theirs, ours)]
    widths = [model.policy.inner.config.get_text_config().vocab_size for model in (teacher, student)]
    if type(theirs) is not type(ours) or theirs.config.model_type != ours.config.model_type:
        different = f"its model type is {theirs.config.model_type}, not {ours.config.model_type}"
    elif vocabularies[0] != vocabularies[1]:
        different = "its tokenizer has other ids for some tokens"
    elif theirs.processor.image_processor.to_dict() != ours.processor.image_processor.to_dict():
        different = "its image processor has other settings"
    elif whole and widths[0] != widths[1]:
        different = f"its vocabulary has {widths[0]} entries, the student's {widths[1]}"
    if different:
        raise MmpostError(
            "MMP-C037",
            f"the teacher {teacher.name} cannot judge this student: {different}.",
            "Take a teacher of the same model family and tokenizer.",
        )
