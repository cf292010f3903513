"""The PyPI package dalle-pytorch (lucidrains), as far as its model goes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

UNUSED = ("omegaconf", "pkg_resources", "requests", "taming", "taming.models", "taming.models.vqgan")
"""Packages that the peer imports for its other dVAEs; stand-ins are enough for the transformer."""


def load_peer() -> Any | None:
    """The module ``dalle_pytorch``, or None where it is not installed."""
    for name in UNUSED:
        if name not in sys.modules:
            stand_in = ModuleType(name)
            stand_in.__getattr__ = lambda attribute: MagicMock()  # type: ignore[method-assign]
            sys.modules[name] = stand_in
    try:
        return importlib.import_module("dalle_pytorch")
    except ModuleNotFoundError as error:
        if error.name == "dalle_pytorch":
            return None
        raise
