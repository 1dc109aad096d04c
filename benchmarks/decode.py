"""Clips and frames per second of ``mmpost.media`` beside the libraries under it, in the same run, taking turns.

    python -m benchmarks.decode [--repeats 9] [--seconds 10] [--only CASE]

Ours checks headers, time stamps and damage, and works in a process that can be killed; the raw side is the shortest
code that gives the same array with the library alone. Writes one JSON line per case to benchmarks/out/decode.jsonl.
``cost`` is our median time over theirs, less one: 0.15 means 15 % slower; one file after the other. ``cost_bulk`` is
the same for many files, as evaluation and the contribution filter read them: ours has a decode process per core,
theirs the one core that it runs on. ``cost_processor`` compares the processor time of all processes instead, one file
after the other, which other users of the machine do not change: on a full machine every change of process waits for
its turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import OUT, device_name
from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio, limits, probe, video
from mmpost.media.many import in_order

RATE = 16000
TARGET = 0.15
CALL_SECONDS = 0.3  # the kernel counts a process's time in hundredths of a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(OUT / "decode.jsonl", "a", encoding="utf-8") as lines:
        for case, ours, raw, frames in cases(Path(folder), options.seconds, options.only):
            line = {"case": case, "device": device_name("cpu"), **compare(ours, raw, frames, options.repeats)}
            print(json.dumps(line))
            lines.write(json.dumps(line) + "\n")


Case = tuple[str, Callable[[], Any], Callable[[], Any], int]


def cases(folder: Path, seconds: float, only: str) -> list[Case]:
    """(name, our call, the raw call, frames per call or 0 for sound)."""
    out: list[Case] = []
    for name, path in sounds(folder, seconds).items():
        raw = raw_pyav_sound if name == "m4a" else raw_soundfile
        section = MediaSection(max_audio_seconds=seconds + 1)
        out.append((f"sound {name}", bind(audio.load, str(path), section=section), bind(raw, str(path)), 0))
    clip, fps = film(folder, seconds), 30
    for backend, raw in (("pyav", raw_pyav), ("decord", raw_decord), ("torchcodec", raw_torchcodec)):
        if not probe.check_video(backend).works:
            print(f"{backend} does not work here")
            continue
        for word, rate in (("every frame", fps), ("2 per second", 2)):
            count = int(seconds * rate)
            section = MediaSection(fps=rate, max_frames=count, decoder=backend)  # type: ignore[arg-type]
            wanted = [round(number * fps / rate) for number in range(count)]
            ours = bind(video.load, str(clip), section=section)
            out.append((f"video {backend}, {word}", ours, bind(raw, str(clip), wanted), count))
    return [case for case in out if only in case[0]]


def bind(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)


def compare(ours: Callable[[], Any], raw: Callable[[], Any], frames: int, repeats: int) -> dict[str, Any]:
    """Medians of calls that take turns, and whether both gave the same."""
    first, theirs = ours(), raw()
    mine = first.frames if frames else first.samples
    same = mine.shape == theirs.shape
    error = float(np.abs(mine.astype(np.float64) - theirs).max()) if same else None
    del first, theirs, mine
    began = time.perf_counter()
    raw()
    calls = max(1, min(50, round(CALL_SECONDS / (time.perf_counter() - began))))
    many = max(calls, 8)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    busy = [0.0, 0.0]
    gc.disable()
    for _ in range(repeats):
        for side, call in enumerate((ours, raw)):
            began, worked = time.perf_counter(), processor_seconds()
            for _ in range(calls):
                call()
            times[side].append((time.perf_counter() - began) / calls)
            busy[side] += processor_seconds() - worked
        began = time.perf_counter()
        for _ in in_order([ours] * many):
            pass
        times[2].append((time.perf_counter() - began) / many)
    gc.enable()
    us, them, bulk = map(statistics.median, times)
    paired = statistics.median(a / b for a, b in zip(*times[:2], strict=True)) - 1
    out: dict[str, Any] = {"ours_s": round(us, 5), "raw_s": round(them, 5), "cost": round(us / them - 1, 3)}
    out |= {"cost_paired": round(paired, 3), "cost_best": round(min(times[0]) / min(times[1]) - 1, 3)}
    out |= {"cost_bulk": round(bulk / them - 1, 3), "clips_per_s_bulk": round(1 / bulk, 2)}
    out |= {"cost_processor": round(busy[0] / busy[1] - 1, 3), "calls": calls, "load": round(os.getloadavg()[0], 1)}
    out |= {"clips_per_s": round(1 / us, 2), "raw_clips_per_s": round(1 / them, 2)}
    if frames:
        out |= {"frames_per_s": round(frames / us, 1), "raw_frames_per_s": round(frames / them, 1)}
    return out | {
        "same_shape": same,
        "max_difference": error,
        "repeats": repeats,
        "within_target": out["cost"] <= TARGET,
        "within_target_bulk": out["cost_bulk"] <= TARGET,
    }


def processor_seconds() -> float:
    """Seconds of processor time that this process and the decode processes have used, all threads."""
    ticks = 0
    for child in limits.pids():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def raw_soundfile(path: str) -> Any:
    import soundfile
    import soxr

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    return mono if rate == RATE else soxr.resample(mono, rate, RATE, quality="HQ")


def raw_pyav_sound(path: str) -> Any:
    import av
    import soxr

    with av.open(path) as container:
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
        rate = container.streams.audio[0].rate
    return soxr.resample(samples.mean(axis=0), rate, RATE, quality="HQ")


def raw_pyav(path: str, wanted: list[int]) -> Any:
    import av

    chosen, out = set(wanted), []
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in chosen:
                out.append(frame.to_ndarray(format="rgb24"))
    return np.stack(out)


def raw_decord(path: str, wanted: list[int]) -> Any:
    import decord

    return decord.VideoReader(path, num_threads=1).get_batch(wanted).asnumpy()


def raw_torchcodec(path: str, wanted: list[int]) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path, dimension_order="NHWC").get_frames_at(wanted).data.numpy()


def sounds(folder: Path, seconds: float) -> dict[str, Path]:
    """Noise and tones in the formats of everyday data: stereo at 44.1 kHz, and mono at the model's rate."""
    import av
    import soundfile

    rng = np.random.default_rng(0)
    at = np.arange(int(seconds * 44100)) / 44100
    stereo = np.stack([np.sin(880 * at), np.sin(1320 * at)], 1) * 0.3 + rng.normal(0, 0.02, (len(at), 2))
    out = {}
    for name in ("wav", "flac", "mp3", "ogg"):
        out[f"{name} 44.1 kHz stereo"] = folder / f"stereo.{name}"
        soundfile.write(folder / f"stereo.{name}", stereo, 44100)
    for name in ("wav", "flac"):
        out[f"{name} 16 kHz mono"] = folder / f"mono.{name}"
        soundfile.write(folder / f"mono.{name}", stereo[: int(seconds * RATE), 0], RATE)
    out["m4a"] = folder / "stereo.m4a"
    with av.open(str(out["m4a"]), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=44100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(stereo.T, np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return out


def film(folder: Path, seconds: float, width: int = 640, height: int = 360, fps: int = 30) -> Path:
    """A view that wanders over a large blurred noise, in H.264."""
    import av
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(3))
    scene = np.asarray(large)
    path = folder / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(int(seconds * fps)):
            x, y = (2 * number) % (1280 - width), number % (720 - height)
            frame = av.VideoFrame.from_ndarray(scene[y : y + height, x : x + width], format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    try:
        main()
    except MmpostError as error:
        print(error)
