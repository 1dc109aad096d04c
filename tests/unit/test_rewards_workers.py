"""Worker processes: what hangs is killed, what dies is replaced, what fails names its line, order is kept."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmpost.config.schema import RewardSpec
from mmpost.core.errors import MmpostError
from mmpost.core.rollout import Group, Rollout
from mmpost.core.sample import Part, Sample, Turn
from mmpost.rewards import worker, workers
from mmpost.rewards.score import Reward, resolve, score

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import os, re, time

def square(x):
    return x * x

def pid(x):
    return os.getpid()

def nap(x):
    time.sleep(x)
    return x

def hang(x):
    while x < 0:
        pass
    return x

def runaway(x):
    # Holds the interpreter: no thread and no Python signal handler can stop it.
    return re.match("(a+)+b", "a" * 60) if x < 0 else x

def fail(x):
    if x < 0:
        raise ValueError("negative")
    return x

def die(x):
    if x < 0:
        os._exit(7)
    return x

def chatty(x):
    print("hello " * 10000, flush=True)
    return x

def leave(x):
    raise SystemExit("bye")

def unpicklable(x):
    return lambda: x
"""
FAIL_LINE = CODE.splitlines().index('        raise ValueError("negative")') + 1


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers") / "jobs.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def pool():
    pool = workers.Pool(2)
    yield pool
    pool.close()


def _values(replies):
    return [None if reply is None else reply.value for reply in replies]


def test_order_is_kept_and_workers_are_kept(pool, file):
    assert _values(pool.map(f"{file}:square", [(n,) for n in range(200)], limit_s=5)) == [n * n for n in range(200)]
    delays = [0.3, 0.0, 0.2, 0.0, 0.1, 0.0]
    assert _values(pool.map(f"{file}:nap", [(s,) for s in delays], limit_s=5)) == delays
    before = pool.started
    pids = set(_values(pool.map(f"{file}:pid", [(n,) for n in range(20)], limit_s=5)))
    assert pool.started == before
    assert os.getpid() not in pids
    assert len(pids) <= 2


@pytest.mark.parametrize("name", ["hang", "runaway"])
def test_what_hangs_is_killed_within_its_limit_and_the_rest_is_done(pool, file, name):
    pool.map(f"{file}:{name}", [(0,), (1,)], limit_s=5)
    before = pool.started
    clock = time.perf_counter()
    values = _values(pool.map(f"{file}:{name}", [(1,), (-1,), (2,), (3,)], limit_s=0.5))
    assert time.perf_counter() - clock < 4
    assert values == [1, None, 2, 3]
    assert pool.started <= before + 1
    assert _values(pool.map(f"{file}:{name}", [(4,), (5,)], limit_s=5)) == [4, 5]


def test_a_worker_that_dies_is_replaced_and_costs_one_item(pool, file):
    assert _values(pool.map(f"{file}:die", [(1,), (-1,), (2,), (3,)], limit_s=5)) == [1, None, 2, 3]


def test_an_idle_worker_that_was_killed_costs_nothing(pool, file):
    for pid in set(_values(pool.map(f"{file}:pid", [(n,) for n in range(20)], limit_s=5))):
        os.kill(pid, signal.SIGKILL)
    assert _values(pool.map(f"{file}:square", [(2,), (3,)], limit_s=5)) == [4, 9]


def test_a_worker_is_recycled_after_its_share_of_items(file):
    one = workers.Pool(1)
    try:
        count = worker.MAX_ITEMS + 10
        pids = _values(one.map(f"{file}:pid", [(n,) for n in range(count)], limit_s=5))
    finally:
        one.close()
    assert len(pids) == count
    assert pids[: worker.MAX_ITEMS].count(pids[0]) == worker.MAX_ITEMS
    assert len(set(pids)) == one.started == 2


def test_a_failure_names_file_and_line(pool, file):
    good, bad = pool.map(f"{file}:fail", [(1,), (-1,)], limit_s=5)
    assert good.value == 1
    assert bad.failure == worker.Failure("ValueError", "negative", f"{file}:{FAIL_LINE}")
    (left,) = pool.map(f"{file}:leave", [(1,)], limit_s=5)
    assert (left.failure.kind, left.failure.text) == ("SystemExit", "bye")
    (odd,) = pool.map(f"{file}:unpicklable", [(1,)], limit_s=5)
    assert odd.failure is not None
    (unknown,) = pool.map(f"{file}:nothing", [(1,)], limit_s=5)
    assert "has no object 'nothing'" in unknown.failure.text


def test_prints_of_a_function_do_not_disturb_its_replies(pool, file):
    assert _values(pool.map(f"{file}:chatty", [(n,) for n in range(5)], limit_s=5)) == list(range(5))


def test_the_deadline_of_the_call_ends_it_and_its_workers(pool, file):
    pool.map(f"{file}:hang", [(0,), (1,)], limit_s=5)
    clock = time.perf_counter()
    with pytest.raises(workers.CallTimeout):
        pool.map(f"{file}:hang", [(-1,)] * 50, limit_s=30, deadline=time.monotonic() + 0.3)
    assert time.perf_counter() - clock < 3
    assert _values(pool.map(f"{file}:square", [(2,)], limit_s=5)) == [4]


def test_threads_share_a_pool(pool, file):
    got = {}

    def ask(k):
        got[k] = _values(pool.map(f"{file}:square", [(10 * k + n,) for n in range(10)], limit_s=5))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {k: [(10 * k + n) ** 2 for n in range(10)] for k in range(4)}


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path, file):
    script = tmp_path / "script.py"
    script.write_text(
        "print('trains')\n"
        "from mmpost.rewards.workers import run\n"
        f"print(run({str(file) + ':square'!r}, [(3,)], limit_s=5))\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "trains\n[9]\n", "")


def test_workers_end_after_a_parent_that_was_killed(tmp_path, file):
    """Even one that is held up inside the regular-expression engine."""
    script = tmp_path / "script.py"
    note = tmp_path / "pids"
    script.write_text(
        textwrap.dedent(f"""
        import time
        from mmpost.rewards import workers
        pool = workers.Pool(1)
        open({str(note)!r}, "w").write(str(pool.map({str(file) + ":pid"!r}, [(1,)], limit_s=1)[0].value) + "\\n")
        pool.map({str(file) + ":runaway"!r}, [(-1,)], limit_s=0.3)
        """)
    )
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 30
    while time.monotonic() < until and not (note.exists() and note.read_text().endswith("\n")):
        time.sleep(0.02)
    pid = int(note.read_text())
    time.sleep(0.3)  # the next item is in work
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        # An orphan that nobody waits for stays in the table as a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- inside score ----------------------------------------------------------------------------------------------------


def _scored(reward, numbers):
    prompt = Sample("p", (Turn("user", (Part("text", "hi"),)),), {})
    group = Group(prompt, [Rollout(np.arange(1), np.zeros(1), str(n), False) for n in numbers], 0)
    stats = score([group], [reward])[reward.name]
    return [rollout.score for rollout in group.rollouts], stats


def _worker_reward(target, *, limit_s=5.0, **spec):
    def in_worker(completions, **columns):
        return workers.run(target, [(float(c[0]["content"]),) for c in completions], limit_s=limit_s)

    return Reward("mine", in_worker, RewardSpec(name="mine", **spec))


def test_a_hanging_item_scores_none_and_is_counted(file):
    reward = _worker_reward(f"{file}:runaway", limit_s=0.5)
    scores, stats = _scored(reward, [0.25, -1, 0.5, -1])
    assert scores == [0.25, None, 0.5, None]
    assert (stats.scored, stats.timed_out, stats.failed, stats.share_not_applicable) == (2, 2, 0, 0.0)
    assert reward.failures == 0


def test_a_failing_item_stops_or_is_left_out_and_counted(file):
    with pytest.raises(MmpostError) as caught:
        _scored(_worker_reward(f"{file}:fail"), [1, -1])
    assert str(caught.value) == (
        f"reward 'mine' raised ValueError: negative ({file}:{FAIL_LINE}). Correct the function, or set "
        "rewards.on_error=null to leave its score out. [MMP-R120]"
    )
    scores, stats = _scored(_worker_reward(f"{file}:fail", on_error="null"), [1, -1, 2])
    assert scores == [1.0, None, 2.0]
    assert (stats.scored, stats.failed, stats.timed_out) == (2, 1, 0)


def test_a_call_that_hangs_in_workers_is_late_as_any_other(file):
    clock = time.perf_counter()
    with pytest.raises(MmpostError) as caught:
        _scored(_worker_reward(f"{file}:hang", limit_s=30, timeout=0.5), [-1, -2, -3])
    assert time.perf_counter() - clock < 5
    assert str(caught.value) == (
        "reward 'mine' took longer than 0.5 s. Make it faster or raise rewards.timeout. [MMP-R122]"
    )
    scores, stats = _scored(_worker_reward(f"{file}:hang", limit_s=30, timeout=0.5, on_error="null"), [1, -1])
    assert scores == [None, None]
    assert stats.timed_out == 2


def test_a_pattern_that_runs_away_is_killed():
    (reward,) = resolve([RewardSpec(name="regex", args={"pattern": "^(a+)+b$", "item_timeout": 0.5})])
    prompt = Sample("p", (Turn("user", (Part("text", "hi"),)),), {})
    texts = ["aab", "a" * 60, "b"]
    group = Group(prompt, [Rollout(np.arange(1), np.zeros(1), text, False) for text in texts], 0)
    clock = time.perf_counter()
    stats = score([group], [reward])
    assert time.perf_counter() - clock < 5
    assert [rollout.score for rollout in group.rollouts] == [1.0, None, 0.0]
    assert stats["regex"].timed_out == 1
