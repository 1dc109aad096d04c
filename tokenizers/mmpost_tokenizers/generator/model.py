"""A class-conditional generator of codes: a plain ``LlamaForCausalLM`` whose prompt is one class token.

Ids: code ``k`` of group ``g`` is ``g * K + k``, class ``c`` is ``G * K + c``, "no class" is the last id. The groups of
a product or residual quantizer become neighbours in the sequence: position 0 group 0, position 0 group 1, ...

Differs: LlamaGen rotates queries and keys by row and column, this model by the place in the sequence
(docs/decisions/0014); its head has rows for the class ids, which are never trained and never sampled.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator.sizes import size

CONFIG_FILE = "generator.json"
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """What the codes of one image look like.

    Attributes:
        codebook_size: Codes per group, K.
        groups: Indices per position, G.
        grid: ``(H, W)`` or ``(N,)``.
        tokenizer_sha256: Hash of everything that decides about the codes: encoder and quantizer, not the decoder.
    """

    codebook_size: int
    groups: int
    grid: tuple[int, ...]
    tokenizer_sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the indices of one image: the grid, then G where it is more than one."""
        return (*self.grid, self.groups) if self.groups > 1 else self.grid

    @property
    def positions(self) -> int:
        """Places of the grid, N."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Codes per image, N * G."""
        return self.positions * self.groups

    def difference(self, other: CodeLayout) -> str:
        """What differs, in words; empty when the layouts are equal."""
        names = {"codebook_size": "codebook size", "groups": "groups", "grid": "grid"}
        for name, words in names.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{words} {_words(mine)} against {_words(theirs)}"
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            return f"tokenizer hash {self.tokenizer_sha256[:12]} against {other.tokenizer_sha256[:12]}"
        return ""


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Everything but the weights.

    Attributes:
        layout: Codes that the model generates.
        num_classes: Classes; "no class" is not counted.
        size: Name in ``sizes.SIZES``.
        class_dropout: Share of the training rows whose class is replaced by "no class".
        dropout: Of embeddings and block outputs while training; None takes that of the size.
    """

    layout: CodeLayout
    num_classes: int
    size: str = "B"
    class_dropout: float = 0.1
    dropout: float | None = None

    @property
    def vocab_size(self) -> int:
        """Codes of all groups, the classes and "no class"."""
        return self.layout.groups * self.layout.codebook_size + self.num_classes + 1


class Decoder(Protocol):
    """Rows of one batch under way, one code at a time."""

    def advance(self, codes: Tensor | None) -> Tensor:
        """Feed the codes drawn last, int64 ``[B]`` (None at the start).

        Returns:
            Float32 logits ``[B, K]`` of the next code.
        """
        ...


class TokenGenerator(Protocol):
    """What ``sample.generate`` needs; another family of generators provides this and a line in ``GENERATORS``."""

    @property
    def config(self) -> GeneratorConfig:
        """Layout of the codes and number of classes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def decoder(self, class_ids: Tensor) -> Decoder:
        """Start to generate for int64 ``[B]`` classes; ``num_classes`` stands for "no class"."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...


class ClassConditionalGenerator(nn.Module):
    """Codes of an image given its class.

    Attributes:
        config: Layout, classes, size.
        llama: The transformer; ``save_pretrained`` writes it so that transformers opens the folder.
    """

    def __init__(self, config: GeneratorConfig, *, seed: int = 0, llama: LlamaForCausalLM | None = None) -> None:
        """Build with weights drawn from ``seed``; the global random state is left as it was.

        Args:
            config: Shape.
            seed: Of the weights.
            llama: Taken instead of random weights; must have the shape of ``config``.

        Raises:
            MmpostError: MMP-C100 for an unknown size.
        """
        super().__init__()
        self.config = config
        if llama is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                llama = LlamaForCausalLM(_llama_config(config))
        self.llama = llama
        dropout = size(config.size).dropout if config.dropout is None else config.dropout
        if dropout:
            _add_dropout(self.llama, dropout)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llama.device

    @property
    def null_class(self) -> int:
        """The class number that stands for "no class"."""
        return self.config.num_classes

    def class_tokens(self, class_ids: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Prompt ids of classes.

        Args:
            class_ids: int64 ``[B]`` in [0, num_classes]; the last one stands for "no class".
            dropped: bool ``[B]``, rows whose class is to be hidden.

        Raises:
            MmpostError: MMP-C105 for a class outside the range.
        """
        check_classes(class_ids, self.config.num_classes + 1)
        if dropped is not None:
            class_ids = class_ids.masked_fill(dropped.to(class_ids.device), self.null_class)
        return class_ids + self.config.layout.groups * self.config.layout.codebook_size

    def sequence(self, codes: Tensor) -> Tensor:
        """Ids ``[B, N * G]`` of codes ``[B, *grid]`` or ``[B, *grid, G]``.

        Raises:
            MmpostError: MMP-C101 for another shape, MMP-C106 for a code outside the codebook.
        """
        layout = self.config.layout
        check_codes(codes, layout)
        offsets = torch.arange(layout.groups, device=codes.device) * layout.codebook_size
        return (codes.reshape(len(codes), layout.positions, layout.groups) + offsets).flatten(1)

    def forward(self, class_ids: Tensor, codes: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Logits of every code given the codes before it.

        Args:
            class_ids: int64 ``[B]`` in [0, num_classes].
            codes: int64 ``[B, *grid]`` or ``[B, *grid, G]``.
            dropped: bool ``[B]``, rows whose class is hidden.

        Returns:
            Float32 ``[B, N * G, K]``, each over the codes of its own group only.
        """
        ids = torch.cat([self.class_tokens(class_ids, dropped)[:, None], self.sequence(codes)[:, :-1]], 1)
        return self._own_codes(self.llama(input_ids=ids, use_cache=False).logits)

    def nll(self, class_ids: Tensor, codes: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Negative log-probability in nats of each code, float32 ``[B, N * G]``."""
        logits = self(class_ids, codes, dropped)
        targets = codes.reshape(len(codes), -1)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    def decoder(self, class_ids: Tensor) -> CachedDecoder:
        """Start to generate; see ``TokenGenerator``."""
        return CachedDecoder(self, class_ids)

    def _own_codes(self, logits: Tensor, first: int = 0) -> Tensor:
        """Cut ``[B, T, V]`` to ``[B, T, K]``: position ``first + t`` keeps the codes of its group."""
        layout = self.config.layout
        codes = logits[..., : layout.groups * layout.codebook_size].float()
        if layout.groups == 1:
            return codes
        by_group = codes.unflatten(-1, (layout.groups, layout.codebook_size))
        group = (torch.arange(logits.shape[1], device=logits.device) + first) % layout.groups
        return by_group[:, torch.arange(logits.shape[1], device=logits.device), group]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and configuration; ``LlamaForCausalLM.from_pretrained`` opens the folder as well."""
        place = Path(folder)
        self.llama.save_pretrained(place)
        (place / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Open a folder of ``save_pretrained``.

        Raises:
            MmpostError: MMP-C109 for a folder that is no generator, or whose weights do not fit.
        """
        place = Path(folder)
        config = _read_config(place)
        try:
            llama, report = LlamaForCausalLM.from_pretrained(place, output_loading_info=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_generator(place, str(error).splitlines()[0]) from error
        lost = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
        if lost:
            raise _no_generator(place, f"its weights lack or do not know {', '.join(lost[:5])}")
        expected = _llama_config(config)
        if any(getattr(llama.config, name) != getattr(expected, name) for name in _SHAPE):
            raise _no_generator(place, f"config.json has another shape than {CONFIG_FILE}")
        return cls(config, llama=llama).eval()


class CachedDecoder:
    """Keys and values of one batch; see ``Decoder``."""

    def __init__(self, model: ClassConditionalGenerator, class_ids: Tensor) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.llama.config)
        self._next = model.class_tokens(class_ids)
        self._step = 0

    def advance(self, codes: Tensor | None) -> Tensor:
        """See ``Decoder``."""
        layout = self._model.config.layout
        if codes is not None:
            self._next = codes + (self._step - 1) % layout.groups * layout.codebook_size
        done = self._model.llama(input_ids=self._next[:, None], past_key_values=self._cache, use_cache=True)
        logits = self._model._own_codes(done.logits, self._step)[:, 0]
        self._step += 1
        return logits


def check_classes(class_ids: Tensor, count: int) -> None:
    """Refuse class numbers outside [0, count).

    Raises:
        MmpostError: MMP-C105.
    """
    bad = class_ids[(class_ids < 0) | (class_ids >= count)]
    if len(bad):
        raise MmpostError(
            "MMP-C105",
            f"class {int(bad[0])} is outside 0 to {count - 1}.",
            "Give labelled images, and a generator with as many classes as there are labels",
        )


def check_codes(codes: Tensor, layout: CodeLayout) -> None:
    """Refuse codes of another shape or outside the codebook.

    Raises:
        MmpostError: MMP-C101, MMP-C106.
    """
    if codes.dtype.is_floating_point or tuple(codes.shape[1:]) != layout.shape:
        raise MmpostError(
            "MMP-C101",
            f"codes have shape {list(codes.shape[1:])} and type {codes.dtype} where the generator needs integers "
            f"{list(layout.shape)}.",
            "Use a tokenizer with one grid of codes, or of groups of codes, per image",
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= layout.codebook_size):
        raise MmpostError(
            "MMP-C106",
            f"codes reach from {int(codes.min())} to {int(codes.max())}, the codebook has {layout.codebook_size}.",
            "Use codes of the generator's tokenizer",
        )


def _llama_config(config: GeneratorConfig) -> LlamaConfig:
    shape = size(config.size)
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        # The class token, then all codes: what shared loops that feed whole sequences need.
        max_position_embeddings=config.layout.length + 1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        # Sequences have a fixed length; the defaults 1 and 2 would be codes.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _add_dropout(llama: LlamaForCausalLM, share: float) -> None:
    """Dropout of LlamaGen: embeddings, and the outputs of attention and MLP before they are added."""
    hook = partial(_drop, share)
    llama.model.embed_tokens.register_forward_hook(hook)
    for layer in llama.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


def _drop(share: float, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return F.dropout(output, share, module.training)


def _read_config(place: Path) -> GeneratorConfig:
    try:
        record = json.loads((place / CONFIG_FILE).read_text())
        layout = record.pop("layout")
        return GeneratorConfig(CodeLayout(**{**layout, "grid": tuple(layout["grid"])}), **record)
    except OSError as error:
        raise _no_generator(place, f"there is no {CONFIG_FILE}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _no_generator(place, f"{CONFIG_FILE} cannot be read") from error


def _no_generator(place: Path, why: str) -> MmpostError:
    return MmpostError("MMP-C109", f"'{place}' is not a generator: {why}.", "Give a folder of `mmpost generator train`")


def _words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
