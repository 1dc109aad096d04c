"""Weights, processor and adapter by name: a hub id, a local folder, or ``tiny-*`` built offline."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, BitsAndBytesConfig

from mmpost.adapters import ADAPTERS
from mmpost.adapters.audio_flamingo import cast_features
from mmpost.config.schema import FullSettings, LoraSettings, MediaSection, ModelSection
from mmpost.core.catalog import Catalog
from mmpost.core.errors import MmpostError
from mmpost.models import tiny
from mmpost.models.policy import Policy

# Module-name prefixes of each part, over all supported families.
PARTS = {
    "vision_tower": ("visual", "vision_model", "vision_tower"),
    "audio_tower": ("audio_tower",),
    "projector": (
        "visual.merger",
        "visual.deepstack_merger_list",
        "connector",
        "multi_modal_projector",
        "audio_tower.proj",
    ),
    "language_model": ("language_model", "text_model", "lm_head"),
}
# Whisper's sinusoids: saved as a parameter, but never trained.
CONSTANT = "audio_tower.embed_positions.weight"


@dataclass(slots=True)
class LoadedModel:
    """Everything that belongs to one checkpoint.

    Attributes:
        policy: The weights.
        adapter: Turns samples into inputs of these weights.
        name: What the user asked for.
        base: Folder or hub id of the full weights under a LoRA adapter, else the checkpoint itself.
        section: The options it was opened with.
        peft: How it trains; None for evaluation.
        fresh_lora: True when its LoRA weights were made here, so that the base alone is the starting point.
    """

    policy: Policy
    adapter: Any
    name: str
    base: str
    section: ModelSection
    peft: LoraSettings | FullSettings | None
    fresh_lora: bool

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a folder that plain transformers opens (weights or adapter, processor, tokenizer).

        Args:
            folder: Made if missing.
            weights: By name, where the model's own are spread over processes; default the model's own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
        self.adapter.save(folder)
        note = {"format": 1, "model_type": self.adapter.config.model_type, "base": self.base}
        (folder / "mmpost.json").write_text(json.dumps(note, indent=2) + "\n")


def tiny_cache() -> Path:
    """Folder in which ``tiny-*`` models are kept between runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpost" / "tiny"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        root = Path(tempfile.gettempdir()) / "mmpost" / "tiny"
        root.mkdir(parents=True, exist_ok=True)
    return root


def load(
    section: ModelSection,
    *,
    peft: LoraSettings | FullSettings | None,
    media: MediaSection | None = None,
    max_length: int = 1 << 30,
    seed: int = 0,
    device: torch.device | None = None,
) -> LoadedModel:
    """Open a checkpoint for training or evaluation.

    Args:
        section: Name, dtype, what to freeze.
        peft: None to load as saved, for evaluation.
        media: Budgets of media.
        max_length: Longest row in tokens.
        seed: Seed of ``tiny-*`` weights and of new LoRA weights.
        device: Where to put the weights; default CUDA if there is one.

    Raises:
        MmpostError: MMP-E030 when the checkpoint cannot be opened, MMP-C006 for an unsupported model type.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = section.model_name_or_path
    path = _resolve(name, seed)
    adapter_folder = path if (Path(path) / "adapter_config.json").is_file() else None
    base = (
        json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
        if adapter_folder
        else path
    )
    options: dict[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = _open(AutoConfig, base, name, **options)
    if config.model_type == "qwen2_5_omni":
        # Only the part that hears, sees and writes trains; what speaks is left out.
        config = config.thinker_config
        options["config"] = config
    adapter_class = Catalog("adapters", ADAPTERS).get(
        config.model_type if section.adapter == "auto" else section.adapter
    )
    plain = {key: value for key, value in options.items() if key != "config"}
    processor = _open(AutoProcessor, path if adapter_folder else base, name, **plain)
    dtype = _dtype(section.dtype, device, peft)
    quantized = section.quantization != "none"
    if quantized:
        options |= _quantization(section, peft, dtype, device)
    model = _open(
        _model_class(config), base, name, dtype=dtype, attn_implementation=section.attn_implementation, **options
    )
    if config.model_type == "audioflamingo3":
        cast_features(model)
    if adapter_folder:
        from peft import PeftModel  # noqa: PLC0415 - imports for seconds, and most runs train in full

        model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=peft is not None)
    elif peft is not None:
        model = _prepare(model, section, peft, seed)
    if peft is None:
        model.requires_grad_(False)
    elif section.gradient_checkpointing:
        _checkpoint_language_model(model)
    if section.use_liger_kernel:
        _use_liger_kernel(model, device)
    adapter = adapter_class(processor, config, media=media or MediaSection(), max_length=max_length)
    adapter.stop_at(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    # Quantized weights were put onto the device as they were read, and cannot be moved.
    policy = Policy(model if quantized else model.to(device)).eval()
    fresh = isinstance(peft, LoraSettings) and adapter_folder is None
    return LoadedModel(policy, adapter, name, base, section, peft, fresh)


def _model_class(config: Any) -> Any:
    """The class of a checkpoint; some with sound are in no list of transformers but their own."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    listed = type(config) in AutoModelForMultimodalLM._model_mapping
    return AutoModelForMultimodalLM if listed or named is None else named


def _resolve(name: str, seed: int) -> str:
    """Folder of a ``tiny-*`` model, which is built when it is not there yet; any other name unchanged."""
    if not name.startswith("tiny-") or Path(name).exists():
        return name
    family, size = tiny.tiny_name(name)
    folder = tiny_cache() / f"{family}-{size}-{seed}-{tiny.VERSION}"
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            built = tiny.build(family, Path(scratch) / "model", seed=seed, size=size)
            try:
                built.rename(folder)
            except OSError:
                # Another process built the same model first; both are identical.
                if not (folder / "config.json").is_file():
                    raise
    return str(folder)


def _open(kind: Any, path: str, name: str, **options: Any) -> Any:
    """``from_pretrained`` with one clear error."""
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise MmpostError("MMP-E030", f"no model folder '{path}'.", "Check model.model_name_or_path.")
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MmpostError(
            "MMP-E030",
            f"cannot open model '{name}': {first}",
            "Give a hub id, a folder written by save_pretrained, or a tiny-* name.",
        ) from error


def _dtype(wanted: str, device: torch.device, peft: LoraSettings | FullSettings | None) -> torch.dtype:
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    full = isinstance(peft, FullSettings)
    # Full fine-tuning keeps float32 master weights and computes under autocast.
    return torch.bfloat16 if device.type == "cuda" and not full else torch.float32


def _quantization(
    section: ModelSection, peft: LoraSettings | FullSettings | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Options of ``from_pretrained`` that store the language model's linear layers in few bits.

    Source: "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314: NormalFloat4 with double quantization.
    The towers and the head stay as they are.
    """
    if isinstance(peft, FullSettings):
        raise MmpostError(
            "MMP-C039",
            f"model.quantization is {section.quantization}, but quantized weights cannot train in full.",
            "Set peft.kind=lora, or model.quantization=none.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MmpostError(
            "MMP-E010",
            f"model.quantization={section.quantization} needs bitsandbytes, which is not installed.",
            "pip install 'mmpost-toolkit[quantization]'",
        )
    skip = [*PARTS["vision_tower"], *PARTS["audio_tower"], *PARTS["projector"], "lm_head"]
    config = BitsAndBytesConfig(
        load_in_4bit=section.quantization == "nf4",
        load_in_8bit=section.quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*skip, *(f"model.{name}" for name in skip)],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _use_liger_kernel(model: Any, device: torch.device) -> None:
    """Fused norms, rotary positions and feed-forward of liger-kernel; Triton, hence CUDA only."""
    if importlib.util.find_spec("liger_kernel") is None or device.type != "cuda":
        lacks = "a CUDA device" if device.type != "cuda" else "liger-kernel, which is not installed"
        raise MmpostError(
            "MMP-E010",
            f"model.use_liger_kernel needs {lacks}.",
            "Set model.use_liger_kernel=false." if device.type != "cuda" else "pip install 'mmpost-toolkit[liger]'",
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # noqa: PLC0415

    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    # The fused loss is left out: the head of the policy never makes all logits either.
    _apply_liger_kernel_to_instance(model=inner, fused_linear_cross_entropy=False, cross_entropy=False)


def _prepare(model: Any, section: ModelSection, peft: LoraSettings | FullSettings, seed: int) -> Any:
    """Freeze what does not train for full fine-tuning, or add LoRA to the language model."""
    if isinstance(peft, LoraSettings):
        if section.trainable:
            raise MmpostError(
                "MMP-C041",
                "model.trainable chooses weights that train as they are, but peft.kind is lora.",
                "Name them in peft.modules_to_save, or set peft.kind=full.",
            )
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - imports for seconds

        targets = _language_linears(model) if peft.target_modules == "all-linear" else peft.target_modules
        # LoRA draws its A matrices from torch's global stream.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(
                model,
                LoraConfig(
                    r=peft.r,
                    lora_alpha=peft.lora_alpha,
                    lora_dropout=peft.lora_dropout,
                    target_modules=targets,
                    modules_to_save=peft.modules_to_save,
                    task_type="CAUSAL_LM",
                ),
            )
    names = [name for name, _ in model.named_parameters()]
    for word in section.trainable:
        if not any(word in name for name in names):
            near = difflib.get_close_matches(word, {name.rpartition(".")[0] for name in names}, 3, 0.0)
            known = f"The nearest of its names: {', '.join(near)}."
            raise MmpostError("MMP-C042", f"model.trainable: no weight of the model has '{word}' in its name.", known)
    for name, parameter in model.named_parameters():
        chosen = not section.trainable or any(word in name for word in section.trainable)
        frozen = part_of(name) in section.freeze or name.endswith(CONSTANT)
        parameter.requires_grad_(chosen and not frozen)
    return model


def part_of(parameter: str) -> str:
    """Which part of the model a parameter belongs to; the projector is asked before the tower that may hold it."""
    name = parameter.removeprefix("model.")
    for part in ("projector", "vision_tower", "audio_tower", "language_model"):
        if name.startswith(PARTS[part]):
            return part
    return "language_model"


def _language_linears(model: Any) -> list[str]:
    """Full names of the linear layers of the language model, the head left out."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and part_of(name) == "language_model" and "lm_head" not in name
    ]


def _checkpoint_language_model(model: Any) -> None:
    """Recompute decoder layers only.

    transformers' model-wide switch also puts require-grad hooks on the vision tower's embedding, so that a frozen
    tower would be recomputed and back-propagated.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    language = getattr(inner.base_model, "language_model", None) or inner.base_model.text_model
    for module in language.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = lambda function, *args, **kwargs: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False, **kwargs
            )
