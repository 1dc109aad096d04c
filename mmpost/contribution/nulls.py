"""Rows whose medium says nothing: silence, noise, nothing at all, or the medium of another row.

==========  ======================  ==========================  ===============================
null        audio                   image                       video
==========  ======================  ==========================  ===============================
silence     zeros, as long          its mean colour, same size  its mean colour, same frames
silence:30  30 seconds of zeros     -                           -
noise       white, as loud as it    uniform, same size          uniform, same frames
none        the part is left out    the part is left out        the part is left out
shuffle     that of another row     that of another row         that of another row
==========  ======================  ==========================  ===============================

``silence`` and ``noise`` keep the length or size, and with it the number of tokens, so that nothing but the content
changes; 30 seconds of silence are what AudioMCQ (arXiv 2509.21060) uses, for whoever repeats its numbers. Silence is
itself unusual to a model, which is why there are several nulls. Noise and other rows are drawn anew for every vote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.core import seeding
from mmpost.core.errors import MmpostError
from mmpost.core.sample import Kind, Part, Sample, Turn
from mmpost.media import audio, image, video, wav
from mmpost.media.film import encode as encode_film

NAMES = ("silence", "noise", "none", "shuffle")
MODALITIES: tuple[Kind, ...] = ("audio", "image", "video")


@dataclass(frozen=True, slots=True)
class Null:
    """One way to take a medium away.

    Attributes:
        name: As the user writes it.
        how: One of ``NAMES``.
        seconds: Length of the silence; None for that of the medium.
    """

    name: str
    how: str
    seconds: float | None = None

    @property
    def varies(self) -> bool:
        """Whether every vote gets a replacement of its own."""
        return self.how in ("noise", "shuffle")


def parse(words: str, modality: Kind) -> tuple[Null, ...]:
    """Nulls of a list between commas; ``all`` stands for every one of ``NAMES``.

    Raises:
        MmpostError: MMP-C004 for an unknown name, and for silence of a given length that is not of sound.
    """
    found: dict[str, Null] = {}
    for word in [word.strip() for word in words.split(",") if word.strip()]:
        for name in NAMES if word == "all" else (word,):
            how, _, length = name.partition(":")
            seconds = _seconds(length) if how == "silence" and modality == "audio" else None
            if how not in NAMES or (length and seconds is None):
                raise MmpostError(
                    "MMP-C004",
                    f"--null '{name}' is not known for {modality}.",
                    f"Known: {', '.join(NAMES)}, all"
                    + ("; silence:30 for 30 seconds." if modality == "audio" else "."),
                )
            found[name] = Null(name, how, seconds)
    if not found:
        raise MmpostError("MMP-C004", "--null is empty.", f"Known: {', '.join(NAMES)}, all.")
    return tuple(found.values())


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= 600 else None


class Replacer:
    """Replaces the media of one kind in rows.

    Args:
        rows: All rows; those with the modality lend their media to others.
        modality: Which media are replaced.
        section: How media are decoded.
        seed: Of noise and of the choice of other rows.
    """

    def __init__(self, rows: Sequence[Sample], modality: Kind, *, section: MediaSection, seed: int) -> None:
        self.rows, self.modality, self.section, self.seed = rows, modality, section, seed

    def __call__(self, number: int, null: Null, vote: int = 0) -> Sample:
        """Row ``number`` without what its media say.

        Args:
            number: Place in ``rows``; keys the random draws.
            null: What comes in the place of the media.
            vote: Number of the vote; a null that varies gives each its own.

        Raises:
            MmpostError: MMP-D061 when no other row can lend its medium, or what the decoders raise.
        """
        row = self.rows[number]
        lent = self._lent(number, vote) if null.how == "shuffle" else []
        place = 0
        turns = []
        for turn in row.turns:
            parts: list[Part] = []
            for part in turn.parts:
                if part.kind != self.modality:
                    parts.append(part)
                elif null.how != "none":
                    ref = lent[place % len(lent)] if lent else self._empty(part, row, null, (number, vote, place))
                    parts.append(dataclasses.replace(part, ref=ref))
                    place += 1
            turns.append(Turn(turn.role, tuple(parts), turn.train))
        return dataclasses.replace(row, turns=tuple(turns))

    def _lent(self, number: int, vote: int) -> list[str | bytes]:
        """Media of another row, every one as likely."""
        count = len(self.rows)
        start = int(seeding.uniform(self.seed, "contribution/shuffle", number, vote) * (count - 1))
        own = {part.ref for part in self.rows[number].media(self.modality)}
        for step in range(count - 1):
            other = (number + 1 + (start + step) % (count - 1)) % count
            refs = [part.ref for part in self.rows[other].media(self.modality) if part.ref is not None]
            # Several questions may be about one medium.
            if refs and not own & set(refs):
                return refs
        raise MmpostError(
            "MMP-D061",
            f"{self.rows[number].origin}: no other row has another {self.modality} to put in its place.",
            "Give more rows, or leave shuffle out of --null.",
        )

    def _empty(self, part: Part, row: Sample, null: Null, key: tuple[int, int, int]) -> bytes:
        assert part.ref is not None
        if self.modality == "audio":
            sound = audio.load(part.ref, section=self.section, origin=row.origin)
            if null.how == "silence":
                length = len(sound.samples) if null.seconds is None else round(null.seconds * sound.rate)
                return wav.encode(np.zeros(length), sound.rate)
            return wav.encode(self._white(sound.samples, key), sound.rate)
        if self.modality == "image":
            picture = np.asarray(image.load(part.ref, origin=row.origin).convert("RGB"))
            return image.encode(Image.fromarray(self._frames(picture[None], null, key)[0]))
        shown = video.load(part.ref, section=self.section, origin=row.origin)
        return encode_film(self._frames(shown.frames, null, key), shown.times, shown.sampled_fps)

    def _white(self, samples: np.ndarray, key: tuple[int, int, int]) -> np.ndarray:
        """Uniform noise of the same power; -60 dB where the clip is silent."""
        power = max(float(np.sqrt(np.mean(samples.astype(np.float64) ** 2))), 1e-3)
        noise = seeding.uniform(self.seed, "contribution/noise", *key, np.arange(len(samples)))
        return (noise - 0.5) * (2.0 * np.sqrt(3.0) * power)

    def _frames(self, frames: np.ndarray, null: Null, key: tuple[int, int, int]) -> np.ndarray:
        """Frames uint8 ``[T, H, W, 3]`` of one colour or of noise."""
        if null.how == "silence":
            mean = np.round(frames.mean((0, 1, 2), dtype=np.float64)).astype(np.uint8)
            return np.broadcast_to(mean, frames.shape).copy()
        generator = seeding.generator(self.seed, "contribution/noise", *key)
        return generator.integers(0, 256, size=frames.shape, dtype=np.uint8)


def require_media(rows: Sequence[Sample], modality: Kind) -> None:
    """Every row has a medium of the kind.

    Raises:
        MmpostError: MMP-D060 with the first rows that have none.
    """
    without = [row.origin for row in rows if not row.media(modality)]
    if without:
        raise MmpostError(
            "MMP-D060",
            f"{len(without)} of {len(rows)} rows have no {modality}; first: {', '.join(without[:3])}.",
            "Leave them out, or choose another --modality.",
        )
