"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, multimodal rotary positions.

Sources: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and transformers' ``get_rope_index``, which the
tests compare with.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from mmpost.adapters.base import Piece, VisionAdapter
from mmpost.config.schema import MediaSection

# Largest picture when neither the user nor the checkpoint asks for less: about 1,280 tokens of 28 x 28 pixels.
DEFAULT_MAX_PIXELS = 1_003_520


class QwenVLAdapter(VisionAdapter):
    """Pixel patches ``pixel_values [patches, C*t*p*p]`` and their grids ``image_grid_thw [images, 3]``."""

    position_axes = 3

    def apply_pixel_budget(self, media: MediaSection) -> None:
        """Limits are pixel counts; the processor rounds sides to multiples of patch size times merge size."""
        image_processor = self.processor.image_processor
        size = dict(image_processor.size)
        lowest = media.min_pixels or size["shortest_edge"]
        highest = media.max_pixels or min(size["longest_edge"], DEFAULT_MAX_PIXELS)
        image_processor.size = {**size, "shortest_edge": min(lowest, highest), "longest_edge": highest}

    def _tokenize(self, piece: Piece, images: list[Image.Image]) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids and pixels by the checkpoint's tokenizer and image processor.

        The processor around the two only repeats each placeholder; its checks of options cost more than both.
        """
        ids = torch.tensor(self.tokenizer(piece.text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        if not images:
            return ids, {}
        media = dict(self.processor.image_processor(images=images, return_tensors="pt"))
        times = torch.ones_like(ids)
        times[ids == self.image_token_id] = torch.tensor(self.image_lengths(media))
        return ids.repeat_interleave(times), media

    def image_lengths(self, media: dict[str, Tensor]) -> list[int]:
        """One feature per merged square of patches."""
        merge = self.config.vision_config.spatial_merge_size
        return [math.prod(grid) // merge**2 for grid in media["image_grid_thw"].tolist()]

    def positions(self, ids: Tensor, media: dict[str, Tensor]) -> Tensor:
        """Rotary positions over time, height and width, ``[3, T]``.

        Text counts up on all three axes. An image starts at the next free number; its tokens add their row and column.
        Text after it goes on behind the largest number used.
        """
        merge = self.config.vision_config.spatial_merge_size
        grids = iter(media["image_grid_thw"].tolist() if media else [])
        out = torch.empty(3, ids.numel(), dtype=torch.long)
        is_image = ids == self.image_token_id
        index, current = 0, 0
        while index < ids.numel():
            if is_image[index]:
                frames, height, width = next(grids)
                rows, columns = height // merge, width // merge
                count = frames * rows * columns
                place = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
                out[:, index : index + count] = place.view(count, 3).T + current
                current += max(frames, rows, columns)
            else:
                rest = is_image[index:].nonzero()
                count = int(rest[0]) if rest.numel() else ids.numel() - index
                out[:, index : index + count] = torch.arange(count) + current
                current += count
            index += count
        return out
