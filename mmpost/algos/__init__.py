"""One file per method, each with a function ``preset(**constants) -> Method``.

A new objective is a new file here, or a ``file.py:function`` anywhere that ``loss.preset`` names.
"""

from pathlib import Path

# Method name to its preset. Names come from the folder; nothing is imported until it is asked for.
ALGOS = {
    file.stem: f"mmpost.algos.{file.stem}:preset"
    for file in sorted(Path(__file__).parent.glob("*.py"))
    if not file.stem.startswith("_")
}
