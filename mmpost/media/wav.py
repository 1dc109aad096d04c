"""Samples as a WAV file in memory, with the standard library alone."""

from __future__ import annotations

import io
import wave

import numpy as np
import numpy.typing as npt


def encode(samples: npt.NDArray[np.floating], rate: int) -> bytes:
    """A WAV file of one channel and 16 bits.

    Args:
        samples: float ``[n]``, full scale 1; what is louder is cut.
        rate: Samples per second.
    """
    whole = np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2")
    memory = io.BytesIO()
    with wave.open(memory, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.tobytes())
    return memory.getvalue()
