"""Qwen2.5-Omni's thinker: sounds, pictures and videos, with their sound tracks if asked for; text comes out.

Source: Qwen2.5-Omni (arXiv 2503.20215, section 2.2, "time-interleaving") and transformers' ``get_rope_index`` and
processor, which the tests compare with. The sound track of a video is taken with ``data.media.use_audio_in_video``;
otherwise videos are silent.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmpost.adapters.checks import Shown, runs_of
from mmpost.adapters.qwen2_audio import WhisperSounds
from mmpost.adapters.qwen_vl import QwenVLAdapter
from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Kind
from mmpost.media import video as video_media
from mmpost.media.video import Video

Run = tuple[Kind, int]


class QwenOmniAdapter(QwenVLAdapter, WhisperSounds):
    """Arguments of Qwen2.5-VL and Qwen2-Audio side by side; videos have ``video_second_per_grid [videos]``.

    A video that is heard has its pictures and its sound in turns, two seconds of each, between the marks of a sound
    within the marks of a video. Its sound is one of ``input_features``, in reading order with the other sounds.
    """

    kinds: tuple[Kind, ...] = ("image", "video", "audio")
    seconds_name = "video_second_per_grid"
    goes_on_behind_times = True

    def apply_budget(self, media: MediaSection) -> None:
        """Those of both families."""
        super().apply_budget(media)
        self.apply_sound_budget(media)
        # In turns, the placeholders of one item are many stretches.
        self.items_touch = media.use_audio_in_video

    def load_video(self, ref: str | bytes, origin: str) -> Video:
        """A decoded video with its sound track, if it is to be heard and has one."""
        if self.section.use_audio_in_video:
            try:
                return video_media.load(ref, section=self.section, origin=origin, with_audio=True)
            except MmpostError as error:
                if error.code != "MMP-D085":  # a silent film, or no film: then the next line says so
                    raise
        return video_media.load(ref, section=self.section, origin=origin)

    def position_rate(self) -> int | None:
        """A setting of the thinker here, not of its vision tower."""
        rate: int = self.config.position_id_per_seconds
        return rate

    def stretched(self, pairs: Tensor, seconds: Tensor) -> Tensor:
        """The products in another order than in Qwen2.5-VL, which may round otherwise."""
        return pairs * seconds * (self.position_rate() or 1)

    def features(self, shown: Shown) -> dict[str, Tensor]:
        """Pixels and log-mel features."""
        media = super().features(shown)
        return media | self.sound_features(shown) if shown.get("audio") else media

    def lengths(self, kind: Kind, media: dict[str, Tensor]) -> list[int]:
        """Of either family."""
        return self.sound_lengths(media) if kind == "audio" else super().lengths(kind, media)

    # -- videos that are heard -----------------------------------------------------------------------------------

    def _tokenize(self, text: str, shown: Shown) -> tuple[Tensor, dict[str, Tensor]]:
        clips: Sequence[Video] = shown.get("video", ())
        if all(clip.audio is None for clip in clips):
            return super()._tokenize(text, shown)
        heard = self._in_reading_order(text, shown)
        media = self.features(heard)
        left = {kind: iter(self.lengths(kind, media)) for kind in self.kinds}
        times = self._times(self.grids("video", media), media)
        films = iter(clips)
        runs: list[Run] = []

        def spelled(mark: re.Match[str]) -> str:
            kind = self._kind_of(mark[0])
            if kind != "video":
                runs.append((kind, next(left[kind])))
                return mark[0]
            frames, length = next(times), next(left["video"])
            if next(films).audio is None:
                runs.append(("video", length))
                return mark[0]
            turns = self._turns(frames.repeat_interleave(length // len(frames)), next(left["audio"]))
            runs.extend(turns)
            inner = "".join(self.tokens[kind] for kind, _ in turns)
            return self.processor.audio_bos_token + inner + self.processor.audio_eos_token

        text = self._marks().sub(spelled, text)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        counts = torch.ones_like(ids)
        counts[self.token_types(ids) > 0] = torch.tensor([count for _, count in runs])
        return ids.repeat_interleave(counts), media

    def _in_reading_order(self, text: str, shown: Shown) -> Shown:
        """The same with the sound tracks among the sounds, where their videos stand in the text."""
        sounds, films = iter(shown.get("audio", ())), iter(shown.get("video", ()))
        heard = []
        for mark in self._marks().findall(text):
            kind = self._kind_of(mark)
            if kind != "image":
                heard.append(next(sounds) if kind == "audio" else next(films).audio)
        return {**shown, "audio": [sound for sound in heard if sound is not None]}

    def _marks(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokens.values())))

    def _kind_of(self, mark: str) -> Kind:
        return next(kind for kind, token in self.tokens.items() if token == mark)

    def _turns(self, frames: Tensor, sounds: int) -> list[Run]:
        """Stretches of one kind in order, for the times of all video tokens and the number of sound tokens."""
        length = int(self.config.position_id_per_seconds * self.config.seconds_per_chunk)
        pictures, tones = _chunks(frames.tolist(), length), _chunks(range(sounds), length)
        pairs = itertools.zip_longest(pictures, tones, fillvalue=0)
        turns: list[Run] = [run for seen, said in pairs for run in (("video", seen), ("audio", said))]
        return [run for run in turns if run[1]]

    def positions(self, ids: Tensor, media: dict[str, Tensor]) -> Tensor:
        """As Qwen2.5-VL; in a video that is heard, pictures and sound count from the same start.

        Both opening marks have one position, and so have both closing marks, right behind the last token between
        them, even where the other kind has gone further.
        """
        blocks = self._heard(ids)
        if not blocks:
            return super().positions(ids, media)
        parts, start = [], 0
        left = _Shares(media)
        for first, end in [*blocks, (ids.numel(), ids.numel())]:
            if start < first:
                before = ids[start:first]
                parts.append(super().positions(before, left.take(self, before, {"image", "video"})))
            if first < end:
                parts.append(self._block(ids[first:end], left.take(self, ids[first:end], {"video"})))
            start = end
        offsets = itertools.accumulate((int(part[:, -1].max()) + 1 for part in parts[:-1]), initial=0)
        return torch.cat([part + offset for part, offset in zip(parts, offsets, strict=True)], dim=1)

    def _heard(self, ids: Tensor) -> list[tuple[int, int]]:
        """First mark and the place behind the last mark of every video that is heard."""
        seen = ids.tolist()
        opening = (self.config.vision_start_token_id, self.config.audio_start_token_id)
        starts = [at for at in range(len(seen) - 1) if (seen[at], seen[at + 1]) == opening]
        closing = self.config.audio_end_token_id
        return [(at, seen.index(closing, at) + 2) for at in starts]

    def _block(self, ids: Tensor, media: dict[str, Tensor]) -> Tensor:
        out = torch.zeros(3, ids.numel(), dtype=torch.long)
        (_, rows, columns) = self.grids("video", media)[0]
        times = next(self._times(self.grids("video", media), media))
        place = torch.cartesian_prod(times, torch.arange(rows), torch.arange(columns)).view(-1, 3)
        out[:, ids == self.token_ids["video"]] = 1 + place.T
        sounds = ids == self.token_ids["audio"]
        out[:, sounds] = 1 + torch.arange(int(sounds.sum()))
        out[:, -2:] = out[:, -3].max() + 1
        return out


class _Shares:
    """Hands out the grids of pictures and videos of a row, stretch by stretch."""

    def __init__(self, media: dict[str, Tensor]) -> None:
        self.media = media
        self.given = {"image": 0, "video": 0}

    def take(self, adapter: QwenOmniAdapter, ids: Tensor, kinds: set[Kind]) -> dict[str, Tensor]:
        """Grids and seconds of what stands in ``ids``; of a video that is heard there is one."""
        out: dict[str, Tensor] = {}
        for kind in sorted(kinds):
            number = 1 if kinds == {"video"} else len(runs_of(ids == adapter.token_ids[kind]))
            span = slice(self.given[kind], self.given[kind] + number)
            self.given[kind] += number
            names = [f"{kind}_grid_thw", *([adapter.seconds_name] if kind == "video" else [])]
            out |= {name: self.media[name][span] for name in names if name in self.media}
        return out


def _chunks(times: Sequence[int] | range, length: int) -> list[int]:
    """Sizes of successive stretches of times below ``length``, ``2 * length`` and so on.

    As the family does it: a stretch ends at the first time that reaches its limit, and the limit grows once for each
    stretch, so a jump over two limits leaves a stretch of one.

    >>> _chunks([0, 0, 50, 50, 100], 50), _chunks([0, 0, 150, 150], 50)
    ([2, 2, 1], [2, 1, 1])
    """
    return list(_sizes(times, length))


def _sizes(times: Sequence[int] | range, length: int) -> Iterator[int]:
    start, limit = 0, length
    for at, time in enumerate(times):
        if time >= limit:
            yield at - start
            start, limit = at, limit + length
    yield len(times) - start
