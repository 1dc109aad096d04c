"""A class-conditional generator of codes: a plain ``LlamaForCausalLM`` whose prompt is one class token.

Ids: code ``k`` of group ``g`` is ``g * K + k``, class ``c`` is ``G * K + c``, "no class" is the last id. The groups of
a product or residual quantizer become neighbours in the sequence: position 0 group 0, position 0 group 1, ...

Differs: the head has rows for the class ids, which are never trained and never sampled. With ``rope="1d"`` queries and
keys turn by the place in the sequence, with ``"2d"`` by row and column as in LlamaGen (docs/decisions/0014).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mmpost.core.errors import MmpostError
from mmpost_tokenizers.generator.classes import check_classes
from mmpost_tokenizers.generator.layout import CodeLayout, check_codes
from mmpost_tokenizers.generator.rotary import GridRotary
from mmpost_tokenizers.generator.sizes import size

CONFIG_FILE = "generator.json"
# In config.json of generators that plain transformers must not open.
GRID_TYPE = "mmpost_grid_llama"
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Everything but the weights.

    Attributes:
        layout: Codes that the model generates.
        num_classes: Classes; "no class" is not counted.
        size: Name in ``sizes.SIZES``.
        class_dropout: Share of the training rows whose class is replaced by "no class".
        dropout: Of embeddings and block outputs while training; None takes that of the size.
        rope: What queries and keys turn by: ``1d`` the place in the sequence, ``2d`` row and column (``rotary``).
        class_names: Names of the first class numbers; empty where images had none.
    """

    layout: CodeLayout
    num_classes: int
    size: str = "B"
    class_dropout: float = 0.1
    dropout: float | None = None
    rope: Literal["1d", "2d"] = "1d"
    class_names: tuple[str, ...] = ()

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
            MmpostError: MMP-C100 for an unknown size, MMP-C120 where ``rope="2d"`` is impossible.
        """
        super().__init__()
        self.config = config
        if llama is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                llama = LlamaForCausalLM(_llama_config(config))
        self.llama = llama
        if config.rope == "2d":
            rotary = GridRotary(config.layout.grid, config.layout.groups, llama.config.head_dim)
            self.llama.model.rotary_emb = rotary.to(llama.device)
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
        """Write weights and configuration.

        With ``rope="1d"`` ``LlamaForCausalLM.from_pretrained`` opens the folder as well; with ``2d`` it would turn by
        other angles, so the folder names a type that transformers does not know.
        """
        place = Path(folder)
        self.llama.save_pretrained(place)
        if self.config.rope == "2d":
            file = place / "config.json"
            record = json.loads(file.read_text())
            record.update(model_type=GRID_TYPE, architectures=[type(self).__name__])
            file.write_text(json.dumps(record, indent=2) + "\n")
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
            shape = LlamaConfig.from_dict(_plain_type(json.loads((place / "config.json").read_text())))
            llama, report = LlamaForCausalLM.from_pretrained(
                place, config=shape, output_loading_info=True, dtype=torch.float32
            )
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
        record["class_names"] = tuple(record.get("class_names", ()))
        return GeneratorConfig(CodeLayout(**{**layout, "grid": tuple(layout["grid"])}), **record)
    except OSError as error:
        raise _no_generator(place, f"there is no {CONFIG_FILE}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _no_generator(place, f"{CONFIG_FILE} cannot be read") from error


def _plain_type(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _no_generator(place: Path, why: str) -> MmpostError:
    return MmpostError("MMP-C109", f"'{place}' is not a generator: {why}.", "Give a folder of `mmpost generator train`")
