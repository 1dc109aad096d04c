"""Qwen2.5-Omni's thinker: sounds, pictures and silent videos; text comes out.

Source: Qwen2.5-Omni (arXiv 2503.20215) and transformers' ``get_rope_index``, which the tests compare with. The sound
track of a video is not taken; give it as a sound of its own.
"""

from __future__ import annotations

from torch import Tensor

from mmpost.adapters.checks import Shown
from mmpost.adapters.qwen2_audio import WhisperSounds
from mmpost.adapters.qwen_vl import QwenVLAdapter
from mmpost.config.schema import MediaSection
from mmpost.core.sample import Kind


class QwenOmniAdapter(QwenVLAdapter, WhisperSounds):
    """Arguments of Qwen2.5-VL and Qwen2-Audio side by side; videos have ``video_second_per_grid [videos]``."""

    kinds: tuple[Kind, ...] = ("image", "video", "audio")
    seconds_name = "video_second_per_grid"
    goes_on_behind_times = True

    def apply_budget(self, media: MediaSection) -> None:
        """Those of both families."""
        super().apply_budget(media)
        self.apply_sound_budget(media)

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
