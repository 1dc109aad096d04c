r"""From a completion to the answer in it, or to None. None is not an answer and equals nothing.

Order: the last ``\boxed{...}`` with balanced braces, else the last ``<answer>...</answer>``, else what follows the last
"answer is", else None. Everything here takes time in proportion to the text: a policy may write anything.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_PHRASE = re.compile(r"\banswer\s+is\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!](?:\s|$)")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"(?:\(([A-Z])\)?(?:[.):\s].*)?|([A-Z])(?:[.):].*)?)", re.DOTALL)
_VULGAR = re.compile(r"(?<!\d)[¼-¾⅐-⅞]")
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?P<currency>[€£])?(?:(?P<plain>{_DIGITS})(?:/(?P<below>{_DIGITS}))?"
    rf"|\\[dt]?frac(?:\{{(?P<top>{_DIGITS})\}}\{{(?P<bottom>{_DIGITS})\}}|(?P<short>\d\d)))(?P<rest>.*)",
    re.DOTALL,
)

# Units that may stand behind a number, and what else they are written as.
_UNITS = {
    "mm": "millimetre millimetres millimeter millimeters",
    "cm": "centimetre centimetres centimeter centimeters",
    "m": "metre metres meter meters",
    "km": "kilometre kilometres kilometer kilometers",
    "in": "inch inches",
    "ft": "foot feet",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "lb": "lbs pound pounds",
    "ml": "millilitre millilitres milliliter milliliters",
    "l": "litre litres liter liters",
    "ms": "millisecond milliseconds",
    "s": "sec second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years",
    "°": "^\\circ ^{\\circ} deg degree degrees",
    "°c": "",
    "°f": "",
    "%": "\\% percent",
    "dollar": "dollars usd",
    "€": "euro euros eur",
    "£": "gbp",
    "km/h": "kph",
    "mph": "",
    "m/s": "",
    "px": "pixel pixels",
    "unit": "units",
}
_UNIT_OF = {name: unit for unit, others in _UNITS.items() for name in (unit, *others.split())}
_POWER = re.compile(r"(?<=[a-z])(?:\^\{?([23])\}?|([²³]))$")


def text_of(completion: Any) -> str:
    """Text of a completion given as a string or as a message list."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def extract(text: str) -> str | None:
    """The answer in a completion, normalised, or None."""
    found = raw_answer(text)
    if found is None:
        found = _said_last(text)
    cleaned = normalise(found) if found is not None else ""
    return cleaned or None


def _said_last(text: str) -> str | None:
    """What follows the last "answer is", up to the end of the sentence or line."""
    starts = [match.end() for match in _PHRASE.finditer(text)]
    lines = text[starts[-1] :].lstrip().removeprefix(":").lstrip().splitlines() if starts else []
    return _SENTENCE_END.split(lines[0], maxsplit=1)[0] if lines else None


def raw_answer(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, else of the last ``<answer>...</answer>``, as it was written; or None."""
    found = last_boxed(text)
    if found is None:
        tags = _TAG.findall(text)
        found = tags[-1] if tags else None
    return found


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces balance; ``\{`` and ``\}`` are characters, not braces."""
    stack: list[tuple[int, bool]] = []
    start, stop = -1, -1
    for match in _BRACE.finditer(text):
        mark = match.group()
        if mark == "}":
            if stack:
                opened, is_box = stack.pop()
                if is_box and opened > start:
                    start, stop = opened, match.start()
        elif mark.endswith("{") and mark != "\\{":
            stack.append((match.end(), mark != "{"))
    return text[start:stop] if start >= 0 else None


def normalise(text: str) -> str:
    r"""Half-width characters, no ``$``, no ``\text{}``, single spaces, no final punctuation."""
    # Only full-width forms are folded: NFKC would also make 102 of 10² and 21/2 of 2½.
    text = unicodedata.normalize("NFC", text).translate(_HALF_WIDTH)
    text = _VULGAR.sub(lambda match: unicodedata.normalize("NFKC", match.group()).replace("\u2044", "/"), text)
    text = text.replace("\\$", "").replace("$", "").replace("\u2212", "-").replace("\\%", "%")
    text = _TEXT.sub(r"\1", text)
    return " ".join(text.split()).rstrip(".;,! ").strip()


def quantity(text: str | None, *, percent: bool = False) -> tuple[float, str] | None:
    r"""Number and unit that the text is, or None; a text that only contains a number among other words is none.

    Args:
        text: ``7``, ``-1,234.5``, ``1e3``, ``1/2``, ``\frac12``, ``\frac{1}{2}``, ``5 cm``, ``50%``.
        percent: ``50%`` is 0.5 without a unit, not 50 with the unit ``%``.

    Returns:
        The number (finite), and the unit in its short form, empty when there is none or it is no known unit.
    """
    match = _NUMBER.fullmatch(text.strip()) if text is not None else None
    if match is None:
        return None
    unit = _unit((match["currency"] or "") + match["rest"])
    if unit is None:
        return None
    if match["plain"]:
        top, bottom = match["plain"], match["below"] or "1"
    elif match["short"]:
        top, bottom = match["short"][0], match["short"][1]
    else:
        top, bottom = match["top"], match["bottom"]
    below = float(bottom.replace(",", ""))
    value = float(top.replace(",", "")) / below if below else float("inf")
    if not abs(value) < float("inf"):
        return None
    value = -value if match["sign"] == "-" else value
    return (value / 100.0, "") if percent and unit == "%" else (value, unit)


def _unit(text: str) -> str | None:
    """Short form of the unit that the text is; empty for no text, None for one that is no unit."""
    name = " ".join(text.lower().split())
    power = _POWER.search(name)
    if power is None:
        return "" if not name else _UNIT_OF.get(name)
    base = _UNIT_OF.get(name[: power.start()])
    return None if base is None else base + str(int(power.group(1) or {"²": 2, "³": 3}[power.group(2)]))


def to_number(text: str | None, *, percent: bool = False) -> float | None:
    """The number that the text is, whatever its unit, or None; see ``quantity``."""
    found = quantity(text, percent=percent)
    return None if found is None else found[0]


def to_letter(text: str | None) -> str | None:
    """The option letter that the text is (``B``, ``(B)``, ``B. bag``, ``b``), or None."""
    if text is None:
        return None
    body = text.strip()
    match = _LETTER.fullmatch(body.upper() if len(body) == 1 else body)
    return (match.group(1) or match.group(2)) if match else None
