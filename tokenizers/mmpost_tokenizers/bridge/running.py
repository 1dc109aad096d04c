"""What ``mmpost tokenizer bridge-train`` does: codes, channel order, a model of them, held-out nats, folder, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpost.core.errors import MmpostError
from mmpost.runs import svg
from mmpost.runs.folder import RunFolder, Status
from mmpost.runs.live import Progress
from mmpost.runs.page import Block, Drawing, Paragraph, Pictures, Section, Table, write_page
from mmpost.runs.records import read_json, read_jsonl
from mmpost.train.loop import Interrupted
from mmpost_tokenizers import opening
from mmpost_tokenizers.bridge.head import DimensionHead, Head, HeadConfig, ParallelHead
from mmpost_tokenizers.bridge.masked import MaskedBackbone, MaskedConfig, MaskedGenerator
from mmpost_tokenizers.bridge.options import BridgeModelSection, BridgeRunConfig
from mmpost_tokenizers.bridge.order import inverse
from mmpost_tokenizers.bridge.raster import RasterBackbone, RasterConfig, RasterGenerator
from mmpost_tokenizers.bridge.spatial import SpatialGenerator
from mmpost_tokenizers.bridge.training import BridgeTrainer
from mmpost_tokenizers.bridge.vae import QuantizedVAETokenizer
from mmpost_tokenizers.generator.identity import layout_of, require_same
from mmpost_tokenizers.generator.pretokenize import Codes
from mmpost_tokenizers.inputs import Inputs, forget_after, labelled, open_run, place_of
from mmpost_tokenizers.report import grid_png
from mmpost_tokenizers.stopping import StopRequest

COMMAND = "tokenizer bridge-train"
ORDER_FILE, SUMMARY = "dimension_order.json", "summary.json"
HEADS: dict[str, type[Head]] = {"ar": DimensionHead, "independent": ParallelHead}
# Without other images for it, one image in so many is held out.
HELD_OUT = 10


@dataclass(frozen=True, slots=True)
class IndexData:
    """Index maps and classes of images.

    Attributes:
        indices: Small integers ``[N, H, W, C]``.
        labels: int64 ``[N]``, -1 for none.
    """

    indices: Tensor
    labels: Tensor

    @classmethod
    def of(cls, codes: Codes, tokenizer: QuantizedVAETokenizer, name: str) -> IndexData:
        """All crops of ``codes`` as images of their own.

        Raises:
            MmpostError: MMP-C102 for codes of another tokenizer.
        """
        require_same(layout_of(tokenizer), codes.layout, owner="the bridge", other=name)
        # A type that torch can index and that holds the levels: ImageNet's codes then fit into memory.
        small = torch.uint8 if codes.layout.codebook_size <= 256 else torch.int32
        values = torch.from_numpy(codes.codes.numpy().astype(str(small).removeprefix("torch.")))
        shape = (*tokenizer.grid, tokenizer.groups)
        return cls(values.reshape(-1, *shape), codes.labels.repeat_interleave(codes.crops))

    def split(self) -> tuple[IndexData, IndexData]:
        """All but every tenth image, and those; the set may be sorted by class.

        Raises:
            MmpostError: MMP-C098 for fewer than two images.
        """
        if len(self.labels) < 2:
            raise MmpostError("MMP-C098", "bridge: one image cannot be trained on and held out.", "Give more images.")
        every = min(HELD_OUT, len(self.labels))
        out = torch.arange(len(self.labels)) % every == every - 1
        return IndexData(self.indices[~out], self.labels[~out]), IndexData(self.indices[out], self.labels[out])


def train_bridge(
    config: BridgeRunConfig,
    bridge: str,
    codes: str,
    held_out: str | None,
    out: Path,
    *,
    order: str = "auto",
    config_yaml: str,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Train, or go on, or find it done; returns the summary, which is also in ``summary.json``.

    Args:
        config: All options.
        bridge: Folder of ``bridge_vae``.
        codes: Codes of training images, a folder of ``pretokenize``.
        held_out: Codes of others; None holds out every tenth image.
        out: Run folder; the model is in ``final``.
        order: File with the order of the channels, ``auto`` for the one beside the bridge, where there is one, or
            ``none`` for the channels as they come.
        config_yaml: Resolved configuration.
        command: Command line in words.

    Returns:
        ``steps``, ``finished``, ``parameters``, ``nats_per_dimension`` and ``nats_by_channel`` on held-out images,
        ``marginal_nats`` (frequencies of the training levels of each channel, the figure to beat), ``uniform_nats``,
        ``bits_per_token``, ``order``, ``order_from``, ``images``, ``held_out_images``.

    Raises:
        MmpostError: MMP-E085 no bridge, MMP-C094 and MMP-E082 of the order, MMP-C102 codes of another bridge, MMP-C095,
            MMP-C098, MMP-C099, MMP-T002 as ``BridgeTrainer``, MMP-T070 and MMP-E021 another run in ``out``.
        Interrupted: After Ctrl-C, with a checkpoint written.
    """
    tokenizer = open_bridge(bridge)
    steps, order_from = read_order(order, Path(bridge), tokenizer.groups)
    opened = {name: Codes.open(path) for name, path in (("training", codes), ("held-out", held_out)) if path}
    parts = {name: IndexData.of(one, tokenizer, f"the {name} codes") for name, one in opened.items()}
    marks = {"order of the channels": str(steps)}
    for name, one in opened.items():
        marks |= labelled(one.marks(), f"the {name} codes")
    paths = {"bridge": bridge, "codes": codes, "held_out": held_out, "order": order if order != "auto" else None}
    given = Inputs(COMMAND, {name: place_of(path) for name, path in paths.items() if path is not None}, marks)
    folder = open_run(out, given, words=command or ["mmpost", *COMMAND.split()], config_yaml=config_yaml)
    if folder.finished:
        return read_json(out / SUMMARY)
    data, other = (parts["training"], parts["held-out"]) if held_out else parts["training"].split()
    model = new_model(config.model, tokenizer, steps, classes_of(config.model, data, other), config.train.seed)
    session = _Session(config, out, folder, model.to(opening.device()), data, other)
    summary = session.run()
    summary |= {"order": steps or list(range(tokenizer.groups)), "order_from": order_from}
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    _write_page(out, summary, session.trainer.mean, tokenizer, config)
    folder.finish("finished", summary["steps"])
    return summary


def open_bridge(path: str | Path) -> QuantizedVAETokenizer:
    """The tokenizer in a folder of ``mmpost tokenizer bridge``, on the device.

    Raises:
        MmpostError: MMP-E085 for a path without one, and as ``from_pretrained``.
    """
    if not (Path(path) / "config.json").is_file():
        what = f"there is no bridge in '{path}'."
        raise MmpostError("MMP-E085", what, "Make one with `mmpost tokenizer bridge VAE --data IMAGES --out FOLDER`.")
    return QuantizedVAETokenizer.from_pretrained(path).to(opening.device())


def read_order(order: str, bridge: Path, channels: int) -> tuple[list[int] | None, str]:
    """The order of the channels, and where it comes from.

    Args:
        order: ``auto``, ``none`` or a file: a JSON list, or a table with the key ``order``.
        bridge: Folder in which ``auto`` looks.
        channels: C.

    Raises:
        MmpostError: MMP-E082 no such file or no list in it, MMP-C094 no permutation of the channels.
    """
    if order == "none" or (order == "auto" and not (bridge / ORDER_FILE).is_file()):
        return None, "channels as they come"
    file = bridge / ORDER_FILE if order == "auto" else Path(order)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        steps = [int(step) for step in (content["order"] if isinstance(content, Mapping) else content)]
    except FileNotFoundError as error:
        fix = "Give --order auto, none, or the dimension_order.json of `mmpost tokenizer bridge VAE --data IMAGES`."
        raise MmpostError("MMP-E082", f"there is no file '{file}' with a channel order.", fix) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"'{file}' holds no channel order: {type(error).__name__} {error}."
        raise MmpostError("MMP-E082", what, 'It must be a list of channels, or {"order": [...]}.') from error
    if sorted(steps) != list(range(channels)):
        what = f"'{file}' orders channels {steps}, but this bridge has channels 0..{channels - 1}."
        raise MmpostError("MMP-C094", what, "Measure it for this VAE with `mmpost tokenizer bridge VAE --data IMAGES`.")
    inverse(torch.tensor(steps))
    return steps, str(file)


def classes_of(section: BridgeModelSection, *data: IndexData) -> int:
    """Number of classes: what the options say, else one more than the highest label."""
    return section.num_classes or max(1, 1 + max(int(part.labels.max()) for part in data))


def new_model(
    section: BridgeModelSection, tokenizer: QuantizedVAETokenizer, order: list[int] | None, classes: int, seed: int
) -> SpatialGenerator:
    """A model with weights drawn from ``seed``; the global random state is left as it was.

    Raises:
        MmpostError: MMP-C090 for a width that is no multiple of the heads.
    """
    if section.width % section.heads:
        what = f"model.width={section.width} is not a multiple of model.heads={section.heads}."
        raise MmpostError("MMP-C090", what, "Correct model.width or model.heads.")
    grid = (tokenizer.grid[0], tokenizer.grid[1])
    common: dict[str, Any] = {
        "classes": classes,
        "grid": grid,
        "channels": tokenizer.groups,
        "width": section.width,
        "heads": section.heads,
        "dropout": section.dropout,
        "label_dropout": section.label_dropout,
    }
    head = HeadConfig(
        channels=tokenizer.groups,
        levels=tokenizer.codebook_size,
        z_dim=section.width,
        width=section.head_width,
        depth=section.head_depth,
        heads=section.head_heads,
        dropout=section.head_dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = HEADS[section.head](head, order)
        model: SpatialGenerator
        if section.backbone == "raster":
            model = RasterGenerator(
                RasterBackbone(RasterConfig(depth=section.depth, **common)), made, tokenizer.quantizer
            )
        else:
            own: dict[str, Any] = {
                "encoder_depth": section.depth,
                "decoder_depth": section.depth,
                "buffer": section.buffer,
                "mask_min": section.mask_min,
                "mask_std": section.mask_std,
            }
            model = MaskedGenerator(MaskedBackbone(MaskedConfig(**common, **own)), made, tokenizer.quantizer)
    model.tokenizer_sha256 = layout_of(tokenizer).tokenizer_sha256
    return model


class _Session:
    """A trainer with its log, checkpoints and evaluation."""

    def __init__(
        self,
        config: BridgeRunConfig,
        out: Path,
        folder: RunFolder,
        model: SpatialGenerator,
        data: IndexData,
        held_out: IndexData,
    ) -> None:
        self.config, self.out, self.folder, self.data, self.held_out = config, out, folder, data, held_out
        self.progress = Progress(config.log.progress, report=out / "report.html")
        self.levels = model.quantizer.codebook_size
        model.check(held_out.indices, held_out.labels)
        self.trainer = BridgeTrainer(
            model, data.indices, data.labels, config.train, folder=out / "checkpoints", log=self._log
        )
        places = folder.checkpoints()
        if places:
            self.trainer.resume(places[-1])
        forget_after(folder, self.trainer.step)

    def run(self) -> dict[str, Any]:
        """Train to the end; the summary without the order."""
        trainer, every = self.trainer, self.config.eval.eval_steps
        status: Status = "failed"
        try:
            title = f"{self.out.name}: {self.config.model.backbone} model, {self.config.model.head} head"
            self.progress.start(trainer.total, title, first_step=trainer.step)
            with StopRequest(self.progress) as stop:
                while trainer.step < trainer.total:
                    trainer.run(trainer.total if every is None else (trainer.step // every + 1) * every, stop=stop)
                    if stop():
                        status = "interrupted"
                        raise Interrupted
                    if every is not None and trainer.step < trainer.total:
                        self._log({"step": trainer.step, "held_out_nats": float(self._channels().mean())})
            channels = self._channels()
            self._log({"step": trainer.step, "held_out_nats": float(channels.mean())})
            trainer.mean.eval().save_pretrained(self.out / "final")
            status = "interrupted"  # until the page is written; a second call then goes on from here
            return self._summary(channels)
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.progress.stop()
            self.folder.finish(status, trainer.step)

    def _channels(self) -> Tensor:
        held_out = self.held_out
        return self.trainer.evaluate_channels(held_out.indices, held_out.labels, draws=self.config.eval.draws)

    def _log(self, record: Mapping[str, float]) -> None:
        step = int(record["step"])
        row: dict[str, Any] = {**record, "step": step}
        self.folder.log(row)
        self.progress.update(step, row)

    def _summary(self, channels: Tensor) -> dict[str, Any]:
        levels = self.levels
        nats = float(channels.mean())
        return {
            "steps": self.trainer.step,
            "finished": True,
            "backbone": self.config.model.backbone,
            "head": self.config.model.head,
            "parameters": sum(weight.numel() for weight in self.trainer.model.parameters()),
            "nats_per_dimension": nats,
            "nats_by_channel": [round(value, 6) for value in channels.tolist()],
            "marginal_nats": marginal_nats(self.data.indices, self.held_out.indices, levels),
            "uniform_nats": float(torch.tensor(float(levels)).log()),
            "bits_per_token": nats * len(channels) / float(torch.tensor(2.0).log()),
            "images": len(self.data.labels),
            "held_out_images": len(self.held_out.labels),
        }


def marginal_nats(train: Tensor, held_out: Tensor, levels: int) -> float:
    """Mean nats of held-out indices under the training frequencies of each channel, every count raised by one."""
    total = 0.0
    for channel in range(train.shape[-1]):
        counts = torch.bincount(train[..., channel].flatten().long(), minlength=levels).double() + 1
        total -= float((counts / counts.sum()).log()[held_out[..., channel].flatten().long()].mean())
    return total / train.shape[-1]


def _write_page(
    out: Path, summary: dict[str, Any], model: Any, tokenizer: QuantizedVAETokenizer, config: BridgeRunConfig
) -> None:
    rows, _ = read_jsonl(out / "metrics.jsonl")
    lines = []
    for name, title in (("loss", "training"), ("held_out_nats", "held out")):
        points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
        if points:
            lines.append(svg.Series(title, [x for x, _ in points], [y for _, y in points]))
    chart = svg.line_chart(lines, title="nats per dimension")
    figures = ("nats_per_dimension", "marginal_nats", "uniform_nats", "bits_per_token", "parameters", "steps")
    table = Table(["figure", "value"], [[name, f"{summary[name]:.6g}"] for name in figures], title="Held out")
    by_channel = [
        [str(place), str(channel), f"{summary['nats_by_channel'][channel]:.4f}"]
        for place, channel in enumerate(summary["order"])
    ]
    channels = Table(["step of the head", "channel", "held-out nats"], by_channel, title="By channel")
    note = Paragraph(f"{summary['head']} head, {summary['backbone']} model. Order: {summary['order_from']}.", note=True)
    sections = [
        Section("Likelihood", [table, note, channels]),
        Section("Training", [Drawing(chart, title="Nats per dimension")] if chart else []),
    ]
    if config.eval.samples:
        sections.append(Section("Samples", [_samples(model, tokenizer, config)]))
    write_page(out / "report.html", title=out.name, sections=sections, subtitle="mmpost tokenizer bridge-train")


def _samples(model: SpatialGenerator, tokenizer: QuantizedVAETokenizer, config: BridgeRunConfig) -> Block:
    count = config.eval.samples
    labels = torch.arange(count) % model.backbone.config.classes
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(config.train.seed)
    images = tokenizer.detokenize(model.eval().generate(labels.to(device), generator=draw))
    return Pictures([("one column per class, without guidance", grid_png(images, min(10, count)))], title="Samples")
