"""SmolVLM: fixed-size tiles, one block of features per tile, ordinary positions.

Source: SmolVLM (arXiv 2504.05299) and transformers' SmolVLM processor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmpost.adapters.base import MediaAdapter
from mmpost.adapters.checks import Shown
from mmpost.config.schema import MediaSection
from mmpost.core.sample import Kind


class SmolVLMAdapter(MediaAdapter):
    """Tiles ``pixel_values [B, tiles, 3, H, W]`` with ``pixel_attention_mask [B, tiles, H, W]``.

    Rows with fewer tiles are filled with tiles of zeros, which the model recognises and drops.
    """

    def apply_budget(self, media: MediaSection) -> None:
        """The processor limits the longest edge; a pixel budget becomes the edge of a square of that area.

        The edge is a whole number of tiles, at least one, because the processor enlarges a picture to whole tiles.
        """
        image_processor = self.processor.image_processor
        if media.max_pixels is not None:
            size, tile = dict(image_processor.size), image_processor.max_image_size["longest_edge"]
            edge = max(tile, int(media.max_pixels**0.5) // tile * tile)
            image_processor.size = {**size, "longest_edge": min(size["longest_edge"], edge)}

    def _tokenize(self, text: str, shown: Shown) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures by the processor, because tiles have text between them."""
        if not shown:
            return super()._tokenize(text, shown)
        pictures, texts = shown["image"], text.split(self.tokens["image"])
        made = [self.prepared.tensors(one, functools.partial(self._alone, one)) for one in pictures]
        # What stands for a picture begins and ends with a special token, so that the text around it is tokenised as if
        # it stood alone.
        pieces = [super(SmolVLMAdapter, self)._tokenize(piece, {})[0] for piece in texts]
        ids = [pieces[0]]
        for picture, piece in zip(made, pieces[1:], strict=True):
            ids += [picture["ids"], piece]
        names = [name for name in made[0] if name != "ids"]
        return torch.cat(ids), {name: torch.cat([one[name] for one in made], 1) for name in names}

    def _alone(self, picture: Image.Image) -> dict[str, Tensor]:
        """Tiles of one picture, and the ids that stand for it."""
        text, images = [self.tokens["image"]], [[picture]]
        out = self.processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
        media = {name: out[name] for name in ("pixel_values", "pixel_attention_mask") if name in out}
        return {**media, "ids": out["input_ids"][0]}

    def tower_items(self, media: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Tiles, without the filling that the model drops."""
        tiles = media["pixel_values"].flatten(0, 1)
        return {"image": [tile for tile in tiles if tile[0, 0, 0] != 0 or tile.any()]}

    def dummy_media(self) -> dict[str, Tensor]:
        """A black picture, because one of zeros (middle grey) is taken for padding."""
        return self._tokenize(self.tokens["image"], {"image": [Image.new("RGB", (28, 28))]})[1]

    def lengths(self, kind: Kind, media: dict[str, Tensor]) -> list[int]:
        """``image_seq_len`` features per tile."""
        vision = self.config.vision_config
        per_tile = int((vision.image_size // vision.patch_size) ** 2 / self.config.scale_factor**2)
        real = media["pixel_values"].flatten(0, 1).flatten(1).ne(0).any(1)
        return [per_tile] * int(real.sum())

    def join_media(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack rows, filling up to the largest number of tiles.

        Pieces of one row arrive here too; they then sit in separate entries, which is the same order of tiles.
        """
        if not rows:
            return {}
        names = [name for name in ("pixel_values", "pixel_attention_mask") if name in rows[0]]
        tiles = max(row["pixel_values"].shape[1] for row in rows)
        return {name: torch.cat([_fill(row[name], tiles) for row in rows]) for name in names}


def _fill(tensor: Tensor, tiles: int) -> Tensor:
    """Append zero tiles on axis 1."""
    missing = tiles - tensor.shape[1]
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
