"""Qwen2-Audio: sounds of up to 30 seconds as Whisper features, ordinary positions.

Source: Qwen2-Audio (arXiv 2407.10759) and transformers' processor, which the tests compare with.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mmpost.adapters.base import MediaAdapter
from mmpost.adapters.checks import Shown
from mmpost.config.schema import MediaSection
from mmpost.core.sample import Kind
from mmpost.media.audio import Audio

# Below, a clip has fewer than two tokens. The model takes a batch without two placeholders side by side for one that
# was not expanded and lays it out anew.
MIN_FRAMES = 7


class WhisperSounds(MediaAdapter):
    """What adapters of encoders with Whisper's features share.

    Log-mel windows ``input_features [clips, mel, frames]`` and ``feature_attention_mask [clips, frames]``.

    Every clip is filled with silence to the window of the encoder, of which only the clip's own part becomes tokens.
    """

    def apply_sound_budget(self, media: MediaSection) -> None:
        """The encoder's rate, and at most its window: a longer clip would be cut without a word."""
        extractor = self.processor.feature_extractor
        limit = min(media.max_audio_seconds, extractor.n_samples / extractor.sampling_rate)
        budget = {"sample_rate": extractor.sampling_rate, "max_audio_seconds": limit}
        self.section = media.model_copy(update=budget)
        self.min_seconds = MIN_FRAMES * extractor.hop_length / extractor.sampling_rate

    def tokens_for(self, samples: int) -> int:
        """Number of tokens of a clip of so many samples at the encoder's rate."""
        extractor = self.processor.feature_extractor
        return tokens_of(-(-min(samples, extractor.n_samples) // extractor.hop_length))

    def sound_features(self, shown: Shown) -> dict[str, Tensor]:
        """Log-mel features by the checkpoint's extractor."""
        clips: list[Audio] = list(shown["audio"])
        out = self.processor.feature_extractor(
            [clip.samples for clip in clips],
            sampling_rate=self.section.sample_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_features": out["input_features"], "feature_attention_mask": out["attention_mask"]}

    def sound_lengths(self, media: dict[str, Tensor]) -> list[int]:
        """Two convolutions and a pooling leave a quarter of the frames."""
        masks = media.get("feature_attention_mask")
        return [] if masks is None else [tokens_of(int(frames)) for frames in masks.sum(-1)]


class Qwen2AudioAdapter(WhisperSounds):
    """Sounds and text."""

    kinds: tuple[Kind, ...] = ("audio",)

    def apply_budget(self, media: MediaSection) -> None:
        """See ``apply_sound_budget``."""
        self.apply_sound_budget(media)

    def features(self, shown: Shown) -> dict[str, Tensor]:
        """See ``sound_features``."""
        return self.sound_features(shown)

    def lengths(self, kind: Kind, media: dict[str, Tensor]) -> list[int]:
        """See ``sound_lengths``."""
        return self.sound_lengths(media)

    def dummy_media(self) -> dict[str, Tensor]:
        """A tenth of a second of silence."""
        rate = self.section.sample_rate
        silence = Audio(np.zeros(rate // 10, np.float32), rate, 0.1, rate, 1, "")
        return self.features({"audio": [silence]})


def tokens_of(frames: int) -> int:
    """Features of so many log-mel frames; Qwen2-Audio's own formula, 0 for an empty clip."""
    return max(0, (((frames - 1) // 2 + 1) - 2) // 2 + 1)
