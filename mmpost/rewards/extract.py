r"""From a completion to the answer in it, or to None. None is not an answer and equals nothing.

Order: the last ``\boxed{...}`` with balanced braces, else the last ``<answer>...</answer>``, else what follows the last
"answer is", else None.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_PHRASE = re.compile(r"answer\s+is\s*:?\s*([^\n]+?)\s*(?:[.!](?:\s|$)|$)", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LETTER = re.compile(r"^\(?([A-Z])\)?(?:[.):\s].*)?$", re.DOTALL)


def text_of(completion: Any) -> str:
    """Text of a completion given as a string or as a message list."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def extract(text: str) -> str | None:
    """The answer in a completion, normalised, or None."""
    found = last_boxed(text)
    if found is None:
        tags = _TAG.findall(text)
        found = tags[-1] if tags else None
    if found is None:
        phrases = _PHRASE.findall(text)
        found = phrases[-1] if phrases else None
    cleaned = normalise(found) if found is not None else ""
    return cleaned or None


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces balance."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for index in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : index]
        start = text.rfind("\\boxed{", 0, start)
    return None


def normalise(text: str) -> str:
    r"""Half-width characters, no ``$``, no ``\text{}``, single spaces, no final punctuation."""
    text = unicodedata.normalize("NFKC", text).replace("$", "")
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.split()).strip().rstrip(".;,!").strip()


def to_number(text: str | None) -> float | None:
    """The number that the text is, with thousands separators and percent, or None.

    A text that only contains a number among other words is not one.
    """
    if text is None:
        return None
    body = text.strip().removesuffix("%").strip()
    if not _NUMBER.fullmatch(body):
        return None
    return float(body.replace(",", "")) / (100.0 if text.strip().endswith("%") else 1.0)


def to_letter(text: str | None) -> str | None:
    """The option letter that the text is (``B``, ``(B)``, ``B. bag``, ``b``), or None."""
    if text is None:
        return None
    match = _LETTER.match(text.strip() if len(text.strip()) > 1 else text.strip().upper())
    return match.group(1) if match else None
