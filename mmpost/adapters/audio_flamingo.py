"""Audio Flamingo 3: sounds of up to ten minutes as windows of Whisper features, ordinary positions.

Source: Audio Flamingo 3 (arXiv 2507.08128) and transformers' processor, which the tests compare with. The processor
takes one sound per text; here a row may have any number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpost.adapters.checks import Shown
from mmpost.adapters.qwen2_audio import Qwen2AudioAdapter, tokens_of
from mmpost.config.schema import MediaSection
from mmpost.core.sample import Kind


class AudioFlamingoAdapter(Qwen2AudioAdapter):
    """Windows ``input_features [windows, mel, frames]`` and ``input_features_mask [windows, frames]``.

    A clip has one window or more, whose placeholders touch.
    """

    items_touch = True

    def apply_budget(self, media: MediaSection) -> None:
        """At most what the processor takes before it cuts."""
        super().apply_budget(media)
        limit = min(media.max_audio_seconds, float(self.processor.max_audio_len))
        self.section = self.section.model_copy(update={"max_audio_seconds": limit})

    def tokens_for(self, samples: int) -> int:
        """Number of tokens of a clip of so many samples at the encoder's rate."""
        return tokens_of(-(-samples // self.processor.feature_extractor.hop_length))

    def features(self, shown: Shown) -> dict[str, Tensor]:
        """Log-mel features of every window; the last one of a clip is filled with silence."""
        extractor = self.processor.feature_extractor
        size = extractor.n_samples
        samples = [clip.samples for clip in shown["audio"]]
        windows = [one[start : start + size] for one in samples for start in range(0, len(one), size)]
        out = extractor(
            windows, sampling_rate=self.section.sample_rate, return_attention_mask=True, return_tensors="pt"
        )
        return {"input_features": out["input_features"], "input_features_mask": out["attention_mask"]}

    def lengths(self, kind: Kind, media: dict[str, Tensor]) -> list[int]:
        """Of every window."""
        return [tokens_of(int(frames)) for frames in media["input_features_mask"].sum(-1)]

    def spelled(self, text: str, shown: Shown, media: dict[str, Tensor]) -> str:
        """Each placeholder as often as its clip has windows."""
        mark = self.tokens["audio"]
        pieces = text.split(mark)
        clips = shown.get("audio", ())
        if len(pieces) != len(clips) + 1:
            return text
        size = self.processor.feature_extractor.n_samples
        counts = [-(-len(clip.samples) // size) for clip in clips]
        return pieces[0] + "".join(mark * n + rest for n, rest in zip(counts, pieces[1:], strict=True))


def cast_features(model: torch.nn.Module) -> None:
    """Let the encoder take float32 features in any precision, as the other families' encoders do."""
    conv = model.get_submodule("model.audio_tower.conv1")
    conv.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))
