"""What all adapters share: rendering, loss spans, the count check, and padding.

A conversation is cut at the borders of the assistant turns that train. Each piece is tokenised by itself: text pieces
by the tokenizer, pieces with media by the model's own processor, and the ids are joined. The training ids are thus
what a rollout would have produced (prompt, then answer), and the loss span needs no support from the chat template.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpost.adapters.checks import (
    TOKEN_TYPES,
    Piece,
    Shown,
    media_of,
    mismatch,
    refuse_other_kinds,
    runs_of,
    too_long,
)
from mmpost.adapters.prepared import Prepared, content_key
from mmpost.config.schema import MediaSection
from mmpost.core.batch import Batch, Encoded
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Kind, Part, Sample, Turn
from mmpost.media import audio as audio_media
from mmpost.media import image as image_media
from mmpost.media import video as video_media
from mmpost.media.many import in_order

_SLOW: tuple[Kind, ...] = ("audio", "video")  # kinds that are decoded in processes


class MediaAdapter:
    """Media and text through a Hugging Face processor.

    Subclasses say which kinds of media there are, how they become tensors, how those are joined, which positions tokens
    get, and how many tokens an item takes.

    Attributes:
        kinds: Kinds of media that the model takes.
        min_seconds: Shorter sounds are refused.
        section: Budgets, with those of the checkpoint put in.
        tokens: Text of the placeholder of each kind.
        token_ids: Its id.
        processor: The checkpoint's processor.
        pad_token_id: Id that fills padding.
        stop_token_ids: Ids that end a completion.
        media_token_ids: Ids that stand for media and must never be sampled.
    """

    position_axes = 1
    kinds: tuple[Kind, ...] = ("image",)
    min_seconds = audio_media.MIN_SECONDS
    items_touch = False  # whether placeholders of two entries of ``lengths`` may stand side by side

    def __init__(self, processor: Any, config: Any, *, media: MediaSection, max_length: int = 1 << 30) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.config = config
        self.max_length = max_length
        self.section = media
        self.prepared = Prepared()
        self.tokens: dict[Kind, str] = {kind: getattr(processor, f"{kind}_token") for kind in self.kinds}
        self.token_ids: dict[Kind, int] = {kind: getattr(config, f"{kind}_token_id") for kind in self.kinds}
        pad = self.tokenizer.pad_token_id
        self.stop_token_ids = self._stop_ids()
        self.pad_token_id: int = pad if pad is not None else self.stop_token_ids[0]
        self.media_token_ids = self._media_ids()
        self.apply_budget(media)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder of images; -1, which no token has, for a model without images."""
        return self.token_ids.get("image", -1)

    # -- what a family defines -----------------------------------------------------------------------------------

    def apply_budget(self, media: MediaSection) -> None:
        """Set the processor's size limits, and the checkpoint's in ``section``."""
        raise NotImplementedError

    def features(self, shown: Shown) -> dict[str, Tensor]:
        """Model arguments of decoded media."""
        raise NotImplementedError

    def lengths(self, kind: Kind, media: dict[str, Tensor]) -> list[int]:
        """Number of features that the encoder makes of each stretch of placeholders of one kind in a row."""
        raise NotImplementedError

    def spelled(self, text: str, shown: Shown, media: dict[str, Tensor]) -> str:
        """The text with one placeholder for each entry of ``lengths``; families that write times put them in."""
        return text

    def positions(self, ids: Tensor, media: dict[str, Tensor]) -> Tensor:
        """Position ids ``[A, T]`` of a row; plain counting unless the family has its own scheme."""
        return torch.arange(ids.numel())[None]

    def join_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Media tensors of several rows as the model's arguments, in row order."""
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: joined([row[name] for row in rows if name in row]) for name in names}

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode(self, sample: Sample, *, loss_on: str = "assistant") -> Encoded:
        """Token ids, loss mask, positions and media of a conversation that ends with the assistant.

        Args:
            sample: The row.
            loss_on: ``assistant`` trains all assistant turns (except those marked ``train=False``),
                ``last_assistant`` the final one.

        Raises:
            MmpostError: MMP-D014 when the row is too long, MMP-D015 when placeholders and features disagree,
                MMP-D031 when the chat template rewrites earlier turns, MMP-D042 for media of a kind that the model does
                not take, or a decoding error of the media.
        """
        return self._encode_pieces(sample, self._pieces(sample, loss_on))

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The same for a prompt that the policy continues; nothing in it trains."""
        return self._encode_pieces(sample, [self._prompt_piece(sample)])

    def encode_prompts(self, samples: Sequence[Sample]) -> list[Encoded]:
        """``encode_prompt`` of each; sounds and films of the next samples are decoded meanwhile.

        Raises:
            MmpostError: As ``encode_prompt``, when the turn of the sample has come.
        """
        if not any(part.kind in _SLOW for sample in samples for turn in sample.turns for part in turn.parts):
            return [self.encode_prompt(sample) for sample in samples]
        work = [functools.partial(self._decode_ahead, sample) for sample in samples]
        encoded = []
        for sample, media in zip(samples, in_order(work, self.section.decode_processes), strict=True):
            for key in media:
                self.prepared.item(key, functools.partial(media.get, key))
            encoded.append(self.encode_prompt(sample))
        return encoded

    def _decode_ahead(self, sample: Sample) -> dict[tuple[str, ...], Any]:
        """Sounds and films of a sample that are not remembered."""
        found: dict[tuple[str, ...], Any] = {}
        for part in (part for turn in sample.turns for part in turn.parts):
            if part.kind not in _SLOW or part.ref is None:
                continue
            key = content_key(part.kind, part.ref)
            if key not in found and key not in self.prepared:
                found[key] = self._decode_one(part.kind, part.ref, sample.origin)
        return found

    def encode_scrambled(self, sample: Sample, random: np.random.Generator) -> Encoded | None:
        """``encode_prompt`` with the frames of every video in a random order; None for a row without video.

        Frames are shuffled one by one, before families join them into pairs. Times stay sorted, in positions and in
        text: they would tell the order.
        """
        if not sample.media("video"):
            return None

        def scrambled(shown: Shown) -> Shown:
            clips = [clip.shuffled(random) for clip in shown.get("video", ())]
            return {**shown, "video": clips} if clips else shown

        return self._encode_pieces(sample, [self._prompt_piece(sample)], scrambled)

    def _prompt_piece(self, sample: Sample) -> Piece:
        refuse_other_kinds(sample, self.kinds, self.config.model_type)
        return Piece(self._render(sample.turns, generate=True), tuple(sample.media()), False)

    def encode_answer(self, sample: Sample) -> Tensor:
        """Ids of the final assistant turn as ``encode`` trains them, the end token included, int64 ``[n]``.

        Behind the ids of ``encode_prompt`` of the same row without that turn they are the ids of ``encode``.
        """
        pieces = self._pieces(sample, "last_assistant")
        return self._tokenize(next(piece for piece in reversed(pieces) if piece.train).text, {})[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_types(self, ids: Tensor) -> Tensor:
        """What transformers calls ``mm_token_type_ids``: the kind of each id, in the shape of ``ids``."""
        types = torch.zeros_like(ids)
        for kind, token in self.token_ids.items():
            types[ids == token] = TOKEN_TYPES[kind]
        return types

    def _render(self, turns: Sequence[Turn], *, generate: bool) -> str:
        parts = [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part.text} if part.kind == "text" else {"type": part.kind}
                    for part in turn.parts
                ],
            }
            for turn in turns
        ]
        text = self._apply_template(parts, generate)
        said = [part for turn in turns for part in turn.parts]
        if all(part.kind == "text" for part in said) and any(part.text.strip() not in text for part in said):
            # Templates print lists of parts, plain strings, or both; what one of them cannot read it leaves out.
            return self._apply_template([{"role": turn.role, "content": turn.text} for turn in turns], generate)
        return text

    def _apply_template(self, messages: list[dict[str, Any]], generate: bool) -> str:
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise MmpostError(
                "MMP-E031",
                f"the checkpoint (model {self.config.model_type}) has no chat template.",
                "Use an instruction-tuned checkpoint, or put its chat_template.jinja into the model folder.",
            )
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))

    def _pieces(self, sample: Sample, loss_on: str) -> list[Piece]:
        """Cut the rendered conversation at the borders of the turns that train."""
        refuse_other_kinds(sample, self.kinds, self.config.model_type)
        turns = sample.turns
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        chosen = [
            i
            for i, turn in enumerate(turns)
            if turn.role == "assistant" and turn.train and (loss_on == "assistant" or i == last)
        ]
        whole = self._render(turns, generate=False)
        pieces: list[Piece] = []
        cut, turns_cut = 0, 0
        for index in chosen:
            before = self._render(turns[:index], generate=True)
            after = self._render(turns[: index + 1], generate=False)
            if not (whole.startswith(before) and after.startswith(before) and whole.startswith(after.rstrip())):
                raise MmpostError(
                    "MMP-D031",
                    f"{sample.origin}: the chat template rewrites turn {index + 1} when the conversation goes on.",
                    "Set train.loss_on=last_assistant, or use a template that keeps earlier turns as they are.",
                )
            end = len(before) + self._answer_length(after[len(before) :], turns[index].text)
            pieces.append(Piece(whole[cut : len(before)], media_of(turns[turns_cut:index]), False))
            pieces.extend(self._answer_pieces(sample, turns[index], whole[len(before) : end]))
            cut, turns_cut = end, index
        if cut < len(whole) and chosen and chosen[-1] != len(turns) - 1:
            pieces.append(Piece(whole[cut:], media_of(turns[turns_cut:]), False))
        return pieces or [Piece(whole, media_of(turns), False)]

    def _answer_pieces(self, sample: Sample, turn: Turn, text: str) -> list[Piece]:
        """A rendered turn that trains, cut around the parts of it that do not; its end trains with its last part."""
        if all(part.train for part in turn.parts):
            return [Piece(text, (), True)]
        pieces: list[Piece] = []
        cut = 0
        for part in turn.parts:
            start = text.find(part.text, cut)
            if start < 0:
                raise MmpostError(
                    "MMP-D031",
                    f"{sample.origin}: the chat template rewrites a message that has parts with train=false.",
                    "Put the context into the user's message, or use another template.",
                )
            pieces.append(Piece(text[cut : start + len(part.text)], (), part.train))
            cut = start + len(part.text)
        return [*pieces, Piece(text[cut:], (), turn.parts[-1].train)]

    def _answer_length(self, rendered: str, text: str) -> int:
        """Characters of a rendered assistant turn that train: the text and the end-of-turn token behind it."""
        body = rendered.find(text)
        start = (body if body >= 0 else 0) + len(text)
        ends = [
            rendered.find(token, start) + len(token)
            for token in map(self.tokenizer.convert_ids_to_tokens, self.stop_token_ids)
            if rendered.find(token, start) >= 0
        ]
        return min(ends) if ends else len(rendered.rstrip())

    def _encode_pieces(
        self, sample: Sample, pieces: Sequence[Piece], change: Callable[[Shown], Shown] = lambda shown: shown
    ) -> Encoded:
        """Pieces behind each other; ``change`` may replace what was decoded."""
        ids: list[Tensor] = []
        train: list[Tensor] = []
        media: list[dict[str, Tensor]] = []
        for piece in pieces:
            if not piece.text:
                continue
            shown = change(self._decoded(sample, piece.media))
            self._check_marks(sample, piece.text, shown)
            piece_ids, piece_media = self._tokenize(piece.text, shown)
            ids.append(piece_ids)
            train.append(torch.full((piece_ids.numel(),), piece.train))
            if piece_media:
                media.append(piece_media)
        joined = torch.cat(ids)
        tensors = self.join_media(media) if media else {}
        self._check(sample, joined, tensors)
        return Encoded(joined, torch.cat(train), self.positions(joined, tensors), tensors, sample.origin)

    def _decoded(self, sample: Sample, parts: Sequence[Part]) -> Shown:
        """Decoded media of some parts, by kind."""
        shown: dict[Kind, list[Any]] = {}
        for part in parts:
            if part.ref is not None:
                shown.setdefault(part.kind, []).append(self._load(part.kind, part.ref, sample.origin))
        return shown

    def _load(self, kind: Kind, ref: str | bytes, origin: str) -> Any:
        """The decoded medium; the same object while it is remembered."""
        return self.prepared.item(content_key(kind, ref), lambda: self._decode_one(kind, ref, origin))

    def _decode_one(self, kind: Kind, ref: str | bytes, origin: str) -> Any:
        if kind == "audio":
            return audio_media.load(ref, section=self.section, origin=origin, min_seconds=self.min_seconds)
        if kind == "video":
            return self.load_video(ref, origin)
        return image_media.load(ref, origin=origin)

    def load_video(self, ref: str | bytes, origin: str) -> video_media.Video:
        """A decoded video, without its sound track.

        Raises:
            MmpostError: MMP-C068 when the user asks for sound tracks, and what decoding raises.
        """
        if self.section.use_audio_in_video:
            raise MmpostError(
                "MMP-C068",
                f"data.media.use_audio_in_video=true, but the model ({self.config.model_type}) does not hear videos.",
                "Take Qwen2.5-Omni, or set it to false.",
            )
        return video_media.load(ref, section=self.section, origin=origin)

    def _tokenize(self, text: str, shown: Shown) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids with every placeholder as often as the encoder has features for it, and the media tensors.

        The processor's own call does the same with the text; its checks of options cost more than both.
        """
        media = self.features(shown) if shown else {}
        text = self.spelled(text, shown, media)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        times = torch.ones_like(ids)
        for kind in shown:
            times[ids == self.token_ids[kind]] = torch.tensor(self.lengths(kind, media))
        return ids.repeat_interleave(times), media

    def dummy_media(self) -> dict[str, Tensor]:
        """Media tensors of a small medium, for a pass through the tower whose result is not used."""
        raise NotImplementedError

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_marks(self, sample: Sample, text: str, shown: Shown) -> None:
        """One placeholder for each item of a stretch; the processor would raise without naming the row."""
        for kind, items in shown.items():
            marks = text.count(self.tokens[kind])
            if marks != len(items):
                alone = self._tokenize(self.tokens[kind] * len(items), {kind: items})[1]
                features = sum(self.lengths(kind, alone))
                raise mismatch(sample, self.config.model_type, kind, features + marks - len(items), features)

    def _check(self, sample: Sample, ids: Tensor, media: dict[str, Tensor]) -> None:
        """Placeholders equal features item by item, and the row fits. Media are never cut."""
        counts: dict[Kind, int] = {"image": 0, "video": 0, "audio": 0}
        for kind, token in self.token_ids.items():
            counts[kind] = int((ids == token).sum())
            lengths = self.lengths(kind, media) if media else []
            if counts[kind] != sum(lengths):
                raise mismatch(sample, self.config.model_type, kind, counts[kind], sum(lengths))
            # Two wrong items can cancel in the total, which is all that the model itself looks at.
            runs = [] if self.items_touch else runs_of(ids == token)
            for run, features in zip(runs, lengths, strict=False):
                if run != features:
                    raise mismatch(sample, self.config.model_type, kind, run, features)
        total = ids.numel()
        if total > self.max_length:
            raise too_long(sample, total, counts, self.max_length)

    def stop_at(self, ids: int | Sequence[int] | None) -> None:
        """Add end tokens, as a checkpoint's generation settings name them."""
        more = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        self.stop_token_ids = tuple(dict.fromkeys([*self.stop_token_ids, *more]))

    def _stop_ids(self) -> tuple[int, ...]:
        """End tokens of the tokenizer and of the configuration."""
        found = [self.tokenizer.eos_token_id]
        for source in (self.config, getattr(self.config, "text_config", None)):
            value = getattr(source, "eos_token_id", None)
            found.extend(value if isinstance(value, list | tuple) else [value])
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def _media_ids(self) -> tuple[int, ...]:
        kinds = ("image", "video", "audio", "vision_start", "vision_end", "audio_start", "audio_end")
        ids = [getattr(self.config, f"{kind}_token_id", None) for kind in kinds]
        return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))

    # -- batches -------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Encoded], *, left: bool = False) -> Batch:
        """Pad rows into a batch and list its trained positions.

        Args:
            rows: Encoded rows.
            left: Pad on the left, as generation needs.
        """
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id)
        attend = torch.zeros(len(rows), length, dtype=torch.long)
        positions = torch.zeros(self.position_axes, len(rows), length, dtype=torch.long)
        row_index, at, target = [], [], []
        for i, row in enumerate(rows):
            start = length - len(row) if left else 0
            span = slice(start, start + len(row))
            ids[i, span], attend[i, span], positions[:, i, span] = row.ids, 1, row.positions
            trained = row.train.nonzero()[:, 0]
            row_index.append(torch.full_like(trained, i))
            at.append(i * length + trained + start - 1)
            target.append(row.ids[trained])
        inputs = {
            "input_ids": ids,
            "attention_mask": attend,
            "position_ids": positions if self.position_axes > 1 else positions[0],
            **self.join_media([row.media for row in rows if row.media]),
        }
        return Batch(inputs, torch.cat(row_index), torch.cat(at), torch.cat(target), len(rows))

    def save(self, folder: Path) -> None:
        """Write processor, tokenizer and chat template."""
        self.processor.save_pretrained(folder)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors behind each other; a single one is not copied, so that rows with the same picture share it."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
