"""Which image files a folder or list stands for, and which can be used: all are looked at before training.

Looking means decoding, unless there are many files: see ``check_files``. A file that was once decoded is not decoded
again while its size and time of change stay (``decoded``).

Conversions are those of ``mmpost.media.image`` (upright, transparency on white, CMYK to RGB, 16 bits scaled to 8 and
never clipped); what was converted is counted in remarks.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from mmpost.core.errors import MmpostError
from mmpost.data.files import missing_source
from mmpost.media import image as media
from mmpost_tokenizers.decoded import Decoded, Facts

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
OnBad = Literal["error", "quarantine"]
Depth = Literal["auto", "decode", "header"]

# Files that ``auto`` decodes before anything else happens: a minute or two with eight threads.
DECODE_UP_TO = 20_000
_LISTED = 100
_PNG = b"\x89PNG\r\n\x1a\n"
_THREADS = 8


class Listed(NamedTuple):
    """One file: where it is, its name in results, and its class number or -1."""

    path: str
    key: str
    label: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Files in a fixed order.

    Attributes:
        files: Sorted by key for a folder, in the order of the list otherwise.
        classes: Names of the class numbers; empty without labels.
        notes: Remarks for the user.
    """

    files: tuple[Listed, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """What is left after looking at every file.

    Attributes:
        listing: Usable files, with remarks about conversions.
        bad: One error per file that cannot be used, with its key.
    """

    listing: Listing
    bad: tuple[tuple[str, MmpostError], ...] = ()


def list_folder(folder: Path, split: str | None = None) -> Listing:
    """All image files below a folder; first-level folders are classes when every file is in one of several.

    Args:
        folder: Existing folder.
        split: Folder of it to take, for example ``train``.

    Raises:
        MmpostError: MMP-D030 for a split that is no folder, MMP-D070 without any image file.
    """
    root = folder if split is None else folder / split
    if not root.is_dir():
        raise missing_source(str(root))
    keys, others = _walk(root)
    if not keys:
        found = f"{sum(others.values())} other files ({_counted(others)})" if others else "no files at all"
        raise MmpostError(
            "MMP-D070", f"{root}: the folder holds no image files, but {found}.", f"Known: {' '.join(SUFFIXES)}"
        )
    tops = [key.partition("/")[0] if "/" in key else "" for key in keys]
    classes = tuple(sorted(set(tops))) if "" not in tops and len(set(tops)) > 1 else ()
    number = {name: index for index, name in enumerate(classes)}
    files = tuple(Listed(str(root / key), key, number.get(top, -1)) for key, top in zip(keys, tops, strict=True))
    notes = (f"{sum(others.values())} files are no images and were left out ({_counted(others)})",) if others else ()
    return Listing(files, classes, notes)


def _walk(root: Path) -> tuple[list[str], Counter[str]]:
    """Sorted keys of image files, and how many others there are by suffix."""
    keys: list[str] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for here, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that goes in a circle
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                keys.append(Path(here, name).relative_to(root).as_posix())
            else:
                others["hidden" if name.startswith(".") else suffix or "no suffix"] += 1
    return sorted(keys), others


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def list_file(path: Path) -> Listing:
    """Files of a text file: a path per line, after a tab its class number if there are labels.

    Relative paths start at the folder of the list. Empty lines and lines that start with ``#`` are skipped.

    Raises:
        MmpostError: MMP-D072 for a class number that is none, MMP-D070 without any line.
    """
    files: list[Listed] = []
    for row, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, number = line.rstrip().partition("\t")
        if number and not number.strip().isdigit():
            raise MmpostError("MMP-D072", f"{path}:{row}: the class '{number}' is not a number.", "Write 0, 1, 2, ...")
        files.append(Listed(str(path.parent / name), name, int(number) if number else -1))
    if not files:
        raise MmpostError("MMP-D070", f"{path}: the list names no image files.", "Write one path per line")
    highest = max(file.label for file in files)
    return Listing(tuple(files), tuple(str(number) for number in range(highest + 1)))


def thinned(listing: Listing, limit: int | None) -> Listing:
    """``limit`` files evenly spread over the listing, which may be sorted by class; all of them for None."""
    count = len(listing.files)
    if limit is None or limit >= count:
        return listing
    return replace(listing, files=tuple(listing.files[at * count // limit] for at in range(limit)))


def check_files(
    listing: Listing,
    *,
    on_bad: OnBad,
    min_side: int,
    depth: Depth,
    quarantine_file: Path | None = None,
    cache: Path | None = None,
) -> Checked:
    """Look at every file.

    Args:
        listing: The files.
        on_bad: ``error`` refuses the whole list when a file is bad; ``quarantine`` leaves bad files out.
        min_side: Images with a shorter side in pixels are bad.
        depth: ``decode`` decodes every file completely; ``header`` trusts what is behind the header, so that a damaged
            file ends the run when its turn comes; ``auto`` decodes up to ``DECODE_UP_TO`` files, and any number of them
            where bad files are to be left out, and otherwise trusts headers and says so in a remark.
        quarantine_file: JSON lines of the bad files are written there.
        cache: Folder that remembers which files were decoded without fault; None decodes them every time.

    Raises:
        MmpostError: MMP-D071, which lists the bad files; MMP-D073 when no file is good.
    """
    if depth == "auto":
        few = len(listing.files) <= DECODE_UP_TO
        depth = "decode" if few or on_bad == "quarantine" else "header"
        trusted = depth == "header"
    else:
        trusted = False
    known = Decoded.open(cache, [file.path for file in listing.files]) if depth == "decode" else Decoded()
    with ThreadPoolExecutor(_THREADS) as pool:  # decoders release the lock of the interpreter
        looks = list(pool.map(lambda file: _look(file, min_side, depth, known), listing.files))
    known.save()
    pairs = list(zip(listing.files, looks, strict=True))
    bad = tuple((file.key, look) for file, look in pairs if isinstance(look, MmpostError))
    good = tuple(file for file, look in pairs if not isinstance(look, MmpostError))
    if bad and quarantine_file is not None:
        write_bad(quarantine_file, bad)
    if bad and on_bad == "error":
        raise _refusal(bad, len(looks))
    if not good:
        raise _refusal(bad, len(looks), none_left=True)
    traits = Counter(trait for look in looks if not isinstance(look, MmpostError) for trait in look)
    notes = [f"{count} {trait}" for trait, count in sorted(traits.items())]
    if bad:
        kept = f"; they are listed in {quarantine_file}" if quarantine_file is not None else ""
        notes.insert(0, f"{len(bad)} of {len(looks)} images cannot be used and were left out{kept}")
    if trusted:
        notes.insert(0, f"{len(looks)} images: only their headers were looked at; check=decode looks inside first")
    return Checked(Listing(good, listing.classes, (*listing.notes, *notes)), bad)


def _look(file: Listed, min_side: int, depth: Depth, known: Decoded) -> MmpostError | tuple[str, ...]:
    """The error of a file, or what is converted in it."""
    found = known.facts(file.path)
    try:
        if found is None:
            width, height = media.size(file.path)
            if min(width, height) >= min_side and depth == "decode":
                media.load(file.path)
            found = Facts(width, height, _traits(file.path))
    except MmpostError as error:
        return error
    if min(found.width, found.height) < min_side:
        what = f"image '{file.path}' is {found.width} x {found.height} px; the shorter side must have {min_side}."
        return MmpostError("MMP-D074", what, "Leave it out")
    if depth == "decode":
        known.add(file.path, found)
    return found.traits


def _traits(path: str) -> tuple[str, ...]:
    """What ``mmpost.media.image.load`` converts in this file."""
    with open(path, "rb") as file:
        head = file.read(26)
        file.seek(0)
        with Image.open(file) as image:
            mode, clear = image.mode, "transparency" in image.info
    traits = []
    if mode == "CMYK":
        traits.append("in CMYK, converted to RGB")
    if mode.startswith("I") or (head.startswith(_PNG) and head[24] == 16):
        traits.append("with 16 bits, scaled to 8")
    if clear or mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        traits.append("with transparency, put on white")
    return tuple(traits)


def _refusal(bad: Sequence[tuple[str, MmpostError]], total: int, *, none_left: bool = False) -> MmpostError:
    lines = [f"  {error.what}" for _, error in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED} more")
    listed = "\n".join(lines) + "\n"
    if none_left:
        return MmpostError("MMP-D073", f"none of {total} images can be used:\n{listed}", "Give other images")
    fix = f"Mend or remove them, or set on_bad=quarantine to go on with the other {total - len(bad)}"
    return MmpostError("MMP-D071", f"{len(bad)} of {total} images cannot be used:\n{listed}", fix)


def write_bad(path: Path, bad: Sequence[tuple[str, MmpostError]]) -> None:
    """List bad files as JSON lines: ``file``, ``code``, ``why``."""
    rows = [json.dumps({"file": key, "code": error.code, "why": error.what}, ensure_ascii=False) for key, error in bad]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
