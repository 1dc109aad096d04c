import functools
import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mmpost.config.schema import MediaSection
from mmpost.core.errors import MmpostError
from mmpost.media import audio, limits, many, video
from mmpost.media.decode_process import answer

pytest.importorskip("soundfile")
pytest.importorskip("av")
pytestmark = pytest.mark.skipif(not limits.CAN_BE_KILLED, reason="needs descriptors over sockets")


def sound(value=1000, count=1600):
    """Sun audio, since plain WAV needs no decode process."""
    samples = np.full(count, value, ">i2").tobytes()
    return struct.pack(">4s5I", b".snd", 24, len(samples), 3, 16000, 1) + samples


def gif(levels, side=200):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (side, side), (level, level, level)) for level in levels]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def level(heard):
    return round(float(heard.samples[0]) * 32768)


@pytest.fixture
def pipe(tmp_path):
    """A file that never gives a byte: whoever opens it hangs."""
    path = tmp_path / "silent.wav"
    os.mkfifo(path)
    return str(path)


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_a_decoder_that_hangs_is_killed_in_time(kind, pipe):
    audio.load(sound())  # the process is up
    before = limits.pid()
    began = time.monotonic()
    section = MediaSection(decode_timeout=0.5, decoder="pyav")
    with pytest.raises(MmpostError) as caught:
        (audio.load if kind == "audio" else video.load)(pipe, section=section, origin="rows.jsonl:4")
    assert time.monotonic() - began < 10
    backend = "soundfile" if kind == "audio" else "pyav"
    assert str(caught.value) == (
        f"rows.jsonl:4: decoding '{pipe}' with {backend} took longer than 0.5 s and was stopped; tried next: none. "
        "Raise data.media.decode_timeout, or check the file [MMP-D009]"
    )
    assert not os.path.exists(f"/proc/{before}")
    assert level(audio.load(sound(77))) == 77
    assert limits.pid() != before


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_decoder_that_crashes_takes_only_its_own_process_with_it(number, pipe):
    audio.load(sound())
    child = limits.pid()
    threading.Timer(0.3, os.kill, (child, number)).start()
    with pytest.raises(MmpostError) as caught:
        audio.load(pipe, section=MediaSection(decode_timeout=20))
    assert caught.value.code == "MMP-D084"
    assert f"decoding audio '{pipe}' with soundfile ended the decode process (signal {int(number)}, " in str(
        caught.value
    )
    assert level(audio.load(sound(5))) == 5


def test_errors_of_one_file_leave_the_process_alive():
    audio.load(sound())
    before = limits.pid()
    for bad in (b"", b"junk" * 100, sound()[:1000]):
        with pytest.raises(MmpostError):
            audio.load(bad)
    assert level(audio.load(sound(9))) == 9
    assert limits.pid() == before


def test_one_process_serves_many_files_and_frees_their_memory():
    first = video.load(gif([10, 200]), section=MediaSection(fps=10))
    before = limits.pid()
    for number in range(1, 31):
        seen = video.load(gif([number, 2 * number]), section=MediaSection(fps=10))
        assert seen.frames[:, 0, 0, 0].tolist() == [number, 2 * number]
    assert limits.pid() == before
    assert len(os.listdir(f"/proc/{before}/fd")) < 40
    assert len(os.listdir("/proc/self/fd")) < 400
    assert first.frames[:, 0, 0, 0].tolist() == [10, 200]  # later files do not write into earlier arrays


def test_arrays_belong_to_the_caller():
    seen = video.load(gif([10, 200]), section=MediaSection(fps=10))
    assert seen.frames.nbytes > 1 << 16  # shared memory
    seen.frames[:] = 3
    limits.close()
    assert int(seen.frames.sum()) == 3 * seen.frames.size


def loaded_in_a_fork(queue):
    queue.put((level(audio.load(sound(31))), limits.pid()))


def test_a_fork_gets_a_process_of_its_own_and_the_parent_keeps_its():
    assert level(audio.load(sound(30))) == 30
    before = limits.pid()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=loaded_in_a_fork, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert [value for value, _ in answers] == [31, 31]
    assert len({before, *(pid for _, pid in answers)}) == 3
    assert level(audio.load(sound(32))) == 32
    assert limits.pid() == before


def test_threads_get_their_own_answers():
    wrong = []

    def work(value):
        for _ in range(20):
            if level(audio.load(sound(value))) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(100 + number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_media_are_decoded_side_by_side_and_come_in_order(pipe):
    limits.close()
    section = MediaSection(decode_timeout=120)

    def hang():
        with pytest.raises(MmpostError, match="MMP-D084"):
            audio.load(pipe, section=section)
        return 0

    def end_both():
        deadline = time.monotonic() + 60
        while len(limits._pool.busy) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.extend(process.child.pid for process in limits._pool.busy)
        for child in ended:
            os.kill(child, signal.SIGKILL)

    ended: list[int] = []
    threading.Thread(target=end_both).start()
    assert list(many.in_order([hang, hang], processes=2)) == [0, 0]
    assert len(set(ended)) == 2
    work = [functools.partial(audio.load, sound(value)) for value in range(1, 60)]
    for processes in (1, 2, 3):
        assert [level(heard) for heard in many.in_order(work, processes)] == list(range(1, 60))
    assert 1 <= len(set(limits.pids())) <= 3
    assert not limits._pool.busy


def test_an_error_comes_up_at_its_place_and_ends_the_order():
    work = [functools.partial(audio.load, blob) for blob in (sound(1), sound(2), b"junk" * 100, sound(3))]
    found = many.in_order(work, processes=2)
    assert [level(next(found)) for _ in range(2)] == [1, 2]
    with pytest.raises(MmpostError, match="MMP-D008"):
        next(found)
    assert level(audio.load(sound(4))) == 4


def test_the_process_ends_with_its_parent(tmp_path):
    (tmp_path / "a.au").write_bytes(sound())
    program = (
        "import os, signal\nfrom mmpost.media import audio, limits\n"
        f"audio.load({str(tmp_path / 'a.au')!r})\nprint(limits.pid(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    child = int(done.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and os.path.exists(f"/proc/{child}"):
        with open(f"/proc/{child}/stat", encoding="ascii") as file:
            if file.read().split()[2] == "Z":  # nobody collects it here
                break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{child}")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps address space limits")
def test_memory_of_one_job_is_limited(tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(gif(range(0, 240, 12), side=1500))
    job = {"op": "video", "path": str(path), "name": "a.gif", "origin": "", "memory_bytes": 64 << 20}
    ask = {
        "backend": "pyav",
        "fps": 10,
        "max_frames": 100,
        "max_pixels": 10**8,
        "start": 0.0,
        "end": None,
        "sound": None,
    }
    with pytest.raises(MmpostError) as caught:
        limits.run({**job, "ask": ask}, ref="a.gif", blob=None, limit_s=60, backend="pillow")
    assert str(caught.value) == (
        "video 'a.gif' needs more memory to decode than is allowed (pillow). "
        "Lower data.media.max_frames, or split the file [MMP-D083]"
    )
    assert level(audio.load(sound(4))) == 4


def test_answers_do_not_depend_on_the_process():
    data = sound(123)
    want = {"rate": 16000, "max_seconds": 30, "min_seconds": 0.0, "start": 0.0, "end": None}
    job = {"op": "audio", "path": None, "name": "<bytes>", "origin": "", "want": want}
    _, arrays = answer(job, data, np.empty)
    np.testing.assert_array_equal(arrays[0], audio.load(data).samples)


def test_no_decoder_is_imported_into_the_training_process():
    program = (
        "import sys\nfrom mmpost.media import audio, video\nfrom mmpost.media.probe import tiny_clip, tiny_sound\n"
        "audio.load(tiny_sound())\nvideo.load(tiny_clip())\n"
        "print([name for name in ('av', 'decord', 'torchcodec', 'torch', 'soundfile') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
