"""Which component has this name: a dict of strings, plus what other distributions register.

Names are listed without importing any component; ``get`` imports on first use.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mmpost.core.errors import MmpostError

# Optional third-party modules and the extra that brings them.
EXTRAS = {
    **{"datasets": "datasets", "num2words": "smolvlm", "gradio": "studio", "math_verify": "math", "vllm": "vllm"},
    **dict.fromkeys(("diffusers", "timm", "torchmetrics", "vector_quantize_pytorch"), "tokenizers"),
}


class Catalog:
    """Components of one kind, by name.

    Attributes:
        kind: Plural noun for messages and for the entry-point group ``mmpost.<kind>``.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def names(self) -> list[str]:
        """Built-in names first, then those of installed plug-ins."""
        return list(self._table) + [name for name in self._plugins() if name not in self._table]

    def _plugins(self) -> dict[str, str]:
        # A plug-in cannot replace a built-in name: the table is asked first.
        return {entry.name: entry.value for entry in entry_points(group=f"mmpost.{self.kind}")}

    def get(self, name: str) -> Any:
        """Import and return the component called ``name``, or ``file.py:object`` of the user's own.

        Raises:
            MmpostError: MMP-C006 for an unknown name, MMP-E010 when an optional library is missing.
        """
        if ".py:" in name:
            return _from_file(name, self.kind)
        target = self._table.get(name) or self._plugins().get(name)
        if target is None:
            raise self._unknown(name)
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name in EXTRAS:
                raise MmpostError(
                    "MMP-E010",
                    f"'{name}' needs {error.name}, which is not installed.",
                    f'Run: pip install "mmpost-toolkit[{EXTRAS[error.name]}]"',
                ) from error
            raise

    def _unknown(self, name: str) -> MmpostError:
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        return MmpostError(
            "MMP-C006", f"unknown name '{name}' among {self.kind}.", f"{hint}Known: {', '.join(self.names())}"
        )


def _from_file(spec: str, kind: str) -> Any:
    """Load ``path/to/file.py:object``. The file is the user's own code, named by the user."""
    path_text, _, attribute = spec.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise MmpostError("MMP-C007", f"no file '{path}' for {kind} entry '{spec}'.", "Check the path.")
    module_name = f"mmpost_user_{path.stem}_{abs(hash(path.resolve()))}"
    if module_name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        if module_spec is None or module_spec.loader is None:
            raise MmpostError("MMP-C007", f"'{path}' is not a Python file.", "Name a .py file.")
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module
        module_spec.loader.exec_module(module)
    try:
        return getattr(sys.modules[module_name], attribute)
    except AttributeError:
        raise MmpostError(
            "MMP-C007", f"'{path}' has no object '{attribute}'.", "Check the name after the colon."
        ) from None
