"""Functions that a config names as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from halfstep.errors import UserError, allowed


def resolve(target: str) -> Callable[..., object]:
    """Imports ``module:function``; modules of the current folder are importable too."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserError(f"target {target!r} is not of the form module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"target {target!r}: cannot import {module_name!r} ({error})") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(f"target {target!r}: no such function; {allowed(attribute, public)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(f"target {target!r} is not a function")
    return function  # type: ignore[no-any-return]
