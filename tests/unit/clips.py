"""Sounds and films of noise as encoded files."""

import io
from fractions import Fraction

import numpy as np

RATE = 16000
FPS = 10


def wav(seconds, seed=0, rate=RATE, samples=None):
    """Bytes of a WAV of noise; ``samples`` says the exact length."""
    count = round(seconds * rate) if samples is None else samples
    noise = np.random.default_rng(seed).normal(0, 0.1, count).astype(np.float32)
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def film(frames, seed=0, width=64, height=48, stamps=None, fps=FPS, sound=0.0):
    """Bytes of a film of noise.

    ``stamps`` are its frames' times in units of 1 / fps; ``sound`` is the length of its sound track in seconds.
    """
    import av

    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("mpeg4", rate=fps, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        track = out.add_stream("pcm_s16le", rate=RATE, layout="mono") if sound else None
        for number in range(frames):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if track is not None:
            tones = rng.integers(-3000, 3000, (1, round(sound * RATE)), dtype=np.int16)
            heard = av.AudioFrame.from_ndarray(tones, format="s16", layout="mono")
            heard.sample_rate, heard.pts = RATE, 0
            out.mux(track.encode(heard))
            out.mux(track.encode(None))
    return buffer.getvalue()
