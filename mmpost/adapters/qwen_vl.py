"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, multimodal rotary positions.

Sources: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and transformers' ``get_rope_index``, which the
tests compare with.

The three tell the model differently when a frame is shown. Qwen2-VL counts pairs of frames. Qwen2.5-VL stretches the
time axis by the mean seconds between pairs. Qwen3-VL writes the seconds of each pair into the text.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmpost.adapters.base import MediaAdapter, joined
from mmpost.adapters.checks import TOKEN_TYPES, Shown
from mmpost.config.schema import MediaSection
from mmpost.core.sample import Kind
from mmpost.media.video import Video

# Largest picture when neither the user nor the checkpoint asks for less: about 1,280 tokens of 28 x 28 pixels.
DEFAULT_MAX_PIXELS = 1_003_520

PICTURES: tuple[Kind, Kind] = ("image", "video")
Grid = tuple[int, int, int]


class QwenVLAdapter(MediaAdapter):
    """Pixel patches ``pixel_values [patches, C*t*p*p]`` and their grids ``image_grid_thw [images, 3]``.

    Videos are ``pixel_values_videos`` and ``video_grid_thw``, and for Qwen2.5-VL ``second_per_grid_ts [videos]``.
    """

    position_axes = 3
    kinds: tuple[Kind, ...] = ("image", "video")
    seconds_name = "second_per_grid_ts"
    goes_on_behind_times = False  # whether text behind a video starts behind its times, too

    def apply_budget(self, media: MediaSection) -> None:
        """Limits are pixel counts; the processor rounds sides to multiples of patch size times merge size."""
        image_processor = self.processor.image_processor
        size = dict(image_processor.size)
        lowest = media.min_pixels or size["shortest_edge"]
        highest = media.max_pixels or min(size["longest_edge"], DEFAULT_MAX_PIXELS)
        image_processor.size = {**size, "shortest_edge": min(lowest, highest), "longest_edge": highest}
        video_processor = self.processor.video_processor
        size = dict(video_processor.size)
        highest = min(size["longest_edge"], self.video_budget(media))
        video_processor.size = {
            **size,
            "shortest_edge": min(size["shortest_edge"], highest),
            "longest_edge": highest,
        }

    def video_budget(self, media: MediaSection) -> int:
        """Largest ``longest_edge`` of the video processor, which counts the pixels of one frame."""
        return media.video_max_pixels

    def features(self, shown: Shown) -> dict[str, Tensor]:
        """Pixels by the checkpoint's image and video processors."""
        media: dict[str, Tensor] = {}
        if shown.get("image"):
            media |= self._together(shown["image"], self._image)
        if shown.get("video"):
            media |= self._together(shown["video"], self._video)
        return media

    def _together(self, items: Sequence[Any], make: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of several items, each made once while it is remembered."""
        made = [self.prepared.tensors(item, functools.partial(make, item)) for item in items]
        return {name: joined([one[name] for one in made]) for name in made[0]}

    def _image(self, picture: Image.Image) -> dict[str, Tensor]:
        """Tensors of one picture."""
        return dict(self.processor.image_processor(images=[picture], return_tensors="pt"))

    def _video(self, clip: Video) -> dict[str, Tensor]:
        """Tensors of one video; frames go in pairs, the last one twice if it is alone."""
        pair = self.config.vision_config.temporal_patch_size
        frames = torch.from_numpy(clip.padded(pair).frames).permute(0, 3, 1, 2)
        # Frames are chosen already, by their times.
        out = self.processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
        media = {name: out[name] for name in ("pixel_values_videos", "video_grid_thw")}
        if self.position_rate() is not None:
            media[self.seconds_name] = torch.tensor([pair / clip.sampled_fps])
        return media

    def tower_items(self, media: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Patches of each picture and of each video."""
        names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
        return {
            kind: list(media[pixels].split(media[grid].prod(-1).tolist()))
            for kind, (pixels, grid) in names.items()
            if pixels in media
        }

    def dummy_media(self) -> dict[str, Tensor]:
        """A small picture."""
        return self.features({"image": [Image.new("RGB", (28, 28))]})

    def grids(self, kind: Kind, media: dict[str, Tensor]) -> list[Grid]:
        """Tokens over time, height and width of each stretch of placeholders of one kind."""
        merge = self.config.vision_config.spatial_merge_size
        patches = media[f"{kind}_grid_thw"].tolist() if f"{kind}_grid_thw" in media else []
        return [(frames, height // merge, width // merge) for frames, height, width in patches]

    def lengths(self, kind: Kind, media: dict[str, Tensor]) -> list[int]:
        """One feature per merged square of patches."""
        return [math.prod(grid) for grid in self.grids(kind, media)]

    def position_rate(self) -> int | None:
        """Position units of a second; None for a family that counts pairs of frames."""
        rate: int | None = getattr(self.config.vision_config, "tokens_per_second", None)
        return rate

    def stretched(self, pairs: Tensor, seconds: Tensor) -> Tensor:
        """Numbers of pairs of frames, so many seconds apart, in position units; rounds as transformers does."""
        return pairs * ((self.position_rate() or 1) * seconds)

    def _times(self, grids: Sequence[Grid], media: dict[str, Tensor]) -> Iterator[Tensor]:
        """Positions on the time axis of the pairs of frames of each video, int64 ``[pairs]``."""
        for number, (frames, _, _) in enumerate(grids):
            pairs = torch.arange(frames)
            known = self.position_rate() is not None
            yield self.stretched(pairs, media[self.seconds_name][number]).long() if known else pairs

    def positions(self, ids: Tensor, media: dict[str, Tensor]) -> Tensor:
        """Rotary positions over time, height and width, ``[3, T]``.

        Text counts up on all three axes. A picture starts at the next free number; its tokens add their time, row and
        column. Text after it goes on behind its rows and columns, as transformers does, even where its times go on,
        unless ``goes_on_behind_times``.
        """
        types = self.token_types(ids)
        images, videos = (self.grids(kind, media) for kind in PICTURES)
        grids = {TOKEN_TYPES["image"]: iter(images), TOKEN_TYPES["video"]: iter(videos)}
        video_times = self._times(videos, media)
        out = torch.empty(3, ids.numel(), dtype=torch.long)
        starts = [0, *(types.diff().nonzero()[:, 0] + 1).tolist(), ids.numel()]
        current = 0
        for start, end in itertools.pairwise(starts):
            kind = int(types[start]) if start < end else 0
            if kind not in grids:
                out[:, start:end] = torch.arange(end - start) + current
                current += end - start
                continue
            frames, rows, columns = next(grids[kind])
            times = next(video_times) if kind == TOKEN_TYPES["video"] else torch.arange(frames)
            place = torch.cartesian_prod(times, torch.arange(rows), torch.arange(columns)).view(-1, 3)
            out[:, start:end] = place.T + current
            current += int(place.max()) + 1 if self.goes_on_behind_times else max(rows, columns)
        return out


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3-VL: the seconds of each pair of frames stand in the text before the tokens of the pair."""

    def video_budget(self, media: MediaSection) -> int:
        """Here ``longest_edge`` counts the pixels of all frames together."""
        return media.video_max_pixels * media.max_frames

    def grids(self, kind: Kind, media: dict[str, Tensor]) -> list[Grid]:
        """Every pair of frames is a stretch of its own."""
        found = super().grids(kind, media)
        return found if kind == "image" else [(1, rows, columns) for t, rows, columns in found for _ in range(t)]

    def spelled(self, text: str, shown: Shown, media: dict[str, Tensor]) -> str:
        """Each video placeholder as one placeholder per pair of frames, with its time before it."""
        mark = self.tokens["video"]
        pieces = text.split(mark)
        clips = shown.get("video", ())
        if len(pieces) != len(clips) + 1:
            return text
        out = pieces[0]
        for clip, rest in zip(clips, pieces[1:], strict=True):
            out += self._stamps(clip) + rest
        return out

    def _stamps(self, clip: Video) -> str:
        pair = self.config.vision_config.temporal_patch_size
        times = clip.padded(pair).times.reshape(-1, pair)
        start, end = self.processor.vision_start_token, self.processor.vision_end_token
        # The middle of the first and last frame that share tokens, as the family was trained.
        return "".join(f"<{(t[0] + t[-1]) / 2:.1f} seconds>{start}{self.tokens['video']}{end}" for t in times)
