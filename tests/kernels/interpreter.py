"""Triton's interpreter, made to run with a current NumPy and in bearable time. Imported under TRITON_INTERPRET=1."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang, _patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
_patched: set[frozenset[str]] = set()


def patch_once(fn: Any) -> Any:
    """The interpreter exchanges Triton's functions for its own at each call of a jitted function; once is enough."""
    modules = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    key = frozenset(module.__name__ for module in modules)
    if key not in _patched:
        _patch_lang(fn)
        _patched.add(key)
    return interpreter._LangPatchScope()


def patch_tensor(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one entry, which NumPy 2.4 no longer takes for a loop's bound."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang, interpreter._patch_lang_tensor = patch_once, patch_tensor
