"""Bugs as edits: a function of the product with some of its words replaced, for a while.

Words that are no longer there fail loudly, so that a planted bug never silently plants nothing.
"""

from __future__ import annotations
import __future__

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from aivillage.ledger import books

Edit = tuple[str, str]


def edited(owner: Any, name: str, *edits: Edit) -> AbstractContextManager[Any]:
    """`owner` (a module or class) has `name` with each (words, other words) applied."""
    source = replaced(textwrap.dedent(inspect.getsource(getattr(owner, name))), *edits)
    module = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]
    code = compile(
        source, f"<{name}, edited>", "exec", __future__.annotations.compiler_flag, dont_inherit=True
    )
    made: dict[str, Any] = {}
    exec(code, vars(module), made)
    return patch.object(owner, name, made[name])


def reworded(owner: Any, name: str, *edits: Edit) -> AbstractContextManager[Any]:
    """The same for a constant that is text, SQL for example."""
    return patch.object(owner, name, replaced(getattr(owner, name), *edits))


def replaced(text: str, *edits: Edit) -> str:
    for old, new in edits:
        assert old in text, f"nothing to plant: {old!r} is gone"
        text = text.replace(old, new)
    return text


def unguarded(*guards: str) -> AbstractContextManager[Any]:
    """New books lack these triggers and CHECK clauses: what stops a bug before it does harm."""
    text = books.schema()
    for guard in guards:
        trigger = re.compile(rf"CREATE TRIGGER {guard} .*?\nBEGIN.*?END;\n", re.DOTALL)
        if trigger.search(text):
            text = trigger.sub("", text)
        else:
            text = replaced(text, (f" CHECK ({guard})", ""))
    return patch.object(books, "schema", lambda: text)


@contextmanager
def together(*plants: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for plant in plants:
            stack.enter_context(plant)
        yield
