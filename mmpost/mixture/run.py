"""Train every mixture of a design briefly, each as an ordinary run of this package, and collect the scores."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpost.config.load import load
from mmpost.config.run import GRPOConfig, SFTConfig
from mmpost.config.upt import UPTConfig
from mmpost.core.errors import MmpostError
from mmpost.core.files import write_whole
from mmpost.mixture.designs import Design
from mmpost.mixture.processes import Engine, Job, Processes
from mmpost.mixture.records import RESULTS, MixtureRecord, run_name, write_records

SETTINGS = "mixture.json"
COMMANDS: dict[str, type[SFTConfig] | type[GRPOConfig]] = {"sft": SFTConfig, "grpo": GRPOConfig, "upt": UPTConfig}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Proxy:
    """The short run that all mixtures share.

    Attributes:
        config: Resolved configuration; its weights are not used.
        file: The configuration file as given.
        overrides: Words behind it.
        names: Name of every source, in order.
    """

    config: SFTConfig | GRPOConfig
    file: str
    overrides: tuple[str, ...]
    names: tuple[str, ...]

    def command(self, weights: dict[str, float], seed: int, folder: Path) -> tuple[str, ...]:
        """The words of one run."""
        shares = [f"data.train.{index}.weight={weights.get(name, 0.0)!r}" for index, name in enumerate(self.names)]
        words = [self.config.command, self.file, *self.overrides, *shares]
        words += [f"train.seed={seed}", f"train.output_dir={folder}", "log.progress=none"]
        return (sys.executable, "-m", "mmpost", *words)

    def settings(self, threads: int) -> dict[str, Any]:
        """What the runs have in common; two sets of runs with different settings do not mix."""
        # Defaults are left out, so that an option that a later version adds makes no difference.
        values = self.config.model_dump(mode="json", exclude_defaults=True)
        sources = values["data"].pop("train")
        for source, name in zip(sources, self.names, strict=True):
            source.pop("weight", None)
            source["name"] = name
        for key in ("seed", "output_dir", "overwrite"):
            values["train"].pop(key, None)
        values.pop("log", None)
        return {"schema": 1, "command": self.config.command, "sources": sources, "threads": threads, "config": values}

    @property
    def rows_per_step(self) -> int:
        """Rows drawn per optimiser step by one process; the share of one for several steps per rollout."""
        train = self.config.train
        if isinstance(self.config, GRPOConfig):
            return self.config.grpo.prompts_per_step // self.config.grpo.mini_batches
        return train.batch_size or train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1)


def open_proxy(file: str, overrides: Sequence[str], sources: Sequence[str], command: str = "auto") -> Proxy:
    """Read the proxy configuration.

    Args:
        file: YAML file or shipped recipe.
        overrides: ``KEY=VALUE`` words.
        sources: Names that the design gives weights to.
        command: ``sft``, ``grpo``, ``upt``, or ``auto``: the first of them that knows all options of the file.

    Raises:
        MmpostError: MMP-V029 when it does not have the design's sources, no limit of steps or no tests; and what the
            configuration says.
    """
    config = _load(file, overrides, command)
    names = tuple(_name(source.name, source.path) for source in config.data.train)
    lacking = [name for name in sources if name not in names]
    what = None
    if lacking or len(set(names)) != len(names):
        what = f"has sources {', '.join(names) or 'none'}, but the design asks for {', '.join(sources)}"
    elif config.train.max_steps is None:
        what = "sets no train.max_steps, so that runs would not be equally long"
    elif not config.eval.tasks:
        what = "has no eval.tasks to score the runs by"
    if what:
        fix = "Give every source of data.train a name, set train.max_steps and eval.tasks."
        raise MmpostError("MMP-V029", f"'{file}' {what}.", fix)
    return Proxy(config, file, tuple(overrides), names)


def _name(name: str | None, path: str) -> str:
    """Name of a source as the trainer gives it: a task's own, else the file's stem."""
    return name or (path.removeprefix("task:") if path.startswith("task:") else Path(path).stem)


def _load(file: str, overrides: Sequence[str], command: str) -> SFTConfig | GRPOConfig:
    if command == "auto":
        for kind in ("sft", "grpo"):
            try:
                return load(COMMANDS[kind], [file], overrides).config
            except MmpostError:
                continue
        command = "upt"  # whatever else is wrong is wrong for the last as well, and told by it
    if command not in COMMANDS:
        known = f"Known: auto, {', '.join(COMMANDS)}"
        raise MmpostError("MMP-C006", f"unknown name '{command}' among commands.", known)
    return load(COMMANDS[command], [file], overrides).config


def run(
    design: Design,
    proxy: Proxy,
    out: Path,
    *,
    jobs: int = 1,
    seeds: Sequence[int] = (0,),
    engine: str = "processes",
    threads: int = 1,
    devices: Sequence[str] = (),
    say: Say = lambda text: None,
) -> list[MixtureRecord]:
    """Run what has not been run yet, and write ``results.jsonl``.

    Args:
        design: Mixtures.
        proxy: The run that they share.
        out: Folder for runs, logs and results; several designs may share it.
        jobs: Runs at once.
        seeds: Every mixture is run once with each.
        engine: ``processes`` or ``ray``.
        threads: CPU threads of a run, 0 for as many as it likes. Fixed, so that scores do not depend on ``jobs``.
        devices: CUDA devices that runs use in turn; for Ray the GPUs of one run.
        say: Told about every run that ends.

    Returns:
        Records of all finished runs in the folder, these and earlier ones.

    Raises:
        MmpostError: MMP-V030 when the folder holds runs of another proxy, MMP-V024 when a run fails (after the
            others).
    """
    wanted = [(weights, seed) for seed in seeds for weights in design.named()]
    _open_folder(out, proxy.settings(threads))
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    todo = {}
    for weights, seed in wanted:
        name = run_name(weights, seed)
        folder = out / "runs" / name
        note = out / "runs" / f"{name}.json"
        _write_json(note, {"weights": weights, "seed": seed})
        command = proxy.command(weights, seed, folder)
        locked, log = out / "locks" / name, out / "logs" / f"{name}.log"
        todo[name] = Job(name, command, folder, log, locked, environment)
    left = [job for job in todo.values() if not is_done(job)]
    say(f"{len(todo) - len(left)} of {len(todo)} runs are there already")
    failed: list[tuple[Job, int]] = []
    for count, (job, code) in enumerate(_engine(engine, jobs, devices).run(left), 1):
        if code:
            failed.append((job, code))
        say(f"{count}/{len(left)} {job.name} {'failed' if code else 'done'}")
    if failed:
        job, code = failed[0]
        lines = job.log.read_text(errors="replace").strip().splitlines()
        raise MmpostError(
            "MMP-V024",
            f"{len(failed)} of {len(left)} proxy runs failed; {job.name} ended with exit code {code}: "
            f"{lines[-1] if lines else 'no message'}",
            f"See {job.log}; the same command runs what is missing.",
        )
    return collect(out, proxy)


def is_done(job: Job) -> bool:
    """Whether the run is finished, its evaluation included."""
    status = job.folder / "status.json"
    return status.is_file() and _read_json(status).get("status") == "finished"


def _engine(name: str, jobs: int, devices: Sequence[str]) -> Engine:
    if name == "processes":
        return Processes(jobs, is_done, devices)
    if name != "ray":
        raise MmpostError("MMP-C006", f"unknown name '{name}' among engines.", "Known: processes, ray")
    try:
        from mmpost.mixture.ray_engine import RayEngine  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        fix = 'Run: pip install "mmpost-toolkit[ray]"'
        raise MmpostError("MMP-E010", "engine 'ray' needs ray, which is not installed.", fix) from error
    return RayEngine(jobs, is_done, devices)


def collect(out: Path, proxy: Proxy) -> list[MixtureRecord]:
    """Read all finished runs of the folder and write ``results.jsonl``; it depends on nothing but the runs."""
    records = []
    for note in sorted((out / "runs").glob("m-*.json")):
        folder = note.with_suffix("")
        if not (folder / "status.json").is_file() or _read_json(folder / "status.json").get("status") != "finished":
            continue
        known = _read_json(note)
        records.append(_record(folder, known["weights"], known["seed"], proxy))
    write_records(out / RESULTS, records)
    return records


def _record(folder: Path, weights: dict[str, float], seed: int, proxy: Proxy) -> MixtureRecord:
    steps = proxy.config.train.max_steps or 0
    per_step: float = proxy.rows_per_step
    if isinstance(proxy.config, GRPOConfig):
        per_step /= proxy.config.grpo.num_iterations
    rows = steps * per_step
    sizes = {entry["name"]: entry["rows"] for entry in json.loads((folder / "data_manifest.json").read_text())}
    scores: dict[str, dict[str, float]] = {}
    for task in proxy.config.eval.tasks:
        result = _read_json(folder / "eval" / f"{task}.json")
        accuracy = result["metrics"]["accuracy"]
        scores[task] = {"value": accuracy["value"], "n": accuracy["n"]}
        for group, share in (result.get("by_group") or {}).items():
            scores[f"{task}.{group}"] = {"value": share["value"], "n": share["n"], "group": 1}
    passes = {name: round(weight * rows / sizes[name], 6) for name, weight in weights.items()}
    model = proxy.config.model.model_name_or_path
    return MixtureRecord(weights, scores, seed, steps, math.floor(rows), passes, model, proxy.config.command)


def _open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Note what the runs have in common, or check that it is what the folder's runs had.

    Raises:
        MmpostError: MMP-V030.
    """
    file = out / SETTINGS
    if not file.is_file():
        _write_json(file, settings)
        return
    before = _read_json(file)
    if before != settings:
        changed = sorted(_different("", before, settings))
        raise MmpostError(
            "MMP-V030",
            f"'{out}' holds runs of another proxy configuration; different: {', '.join(changed[:5])}.",
            "Choose another --out.",
        )


def _different(path: str, one: Any, two: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [*one, *(key for key in two if key not in one)]
        return [d for key in keys for d in _different(f"{path}{key}.", one.get(key), two.get(key))]
    return [] if one == two else [path.removesuffix(".")]


def read_settings(out: Path) -> dict[str, Any]:
    """What the runs of a folder have in common; empty when it is not noted there."""
    file = (out if out.is_dir() else out.parent) / SETTINGS
    return _read_json(file) if file.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
