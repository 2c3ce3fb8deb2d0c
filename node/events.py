"""What happened, as typed lines: logs, counters and tests subscribe to the same events."""

from __future__ import annotations

import collections
import json
import logging
import os
import re
import sys
import time
from typing import Any, Final

TEXT_MAX: Final = 500
_json: Final = json.JSONEncoder(default=str).encode
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_log = logging.getLogger("aivillage")


class Events:
    """Counts and logs events; the last ones are kept for `status` and for tests."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.recent: collections.deque[tuple[float, str, dict[str, Any]]] = collections.deque(
            maxlen=256  # a screen or two of history for `doctor`
        )

    def emit(
        self,
        name: str,
        *,
        level: int = logging.INFO,
        exc_info: BaseException | None = None,
        **fields: Any,
    ) -> None:
        """Records `name`, past tense, with its fields; a defect also with its traceback."""
        if exc_info is not None:
            fields["error"] = repr(exc_info)
        fields = {key: _cut(value) for key, value in fields.items()}
        self.counts[name] += 1
        self.recent.append((time.time(), name, fields))
        if _log.isEnabledFor(level):
            _log.log(level, "%s %s", name, _json(fields), exc_info=exc_info)


def _cut(value: Any) -> Any:
    """A peer may have written a text: it is kept for a while, so it is not kept whole."""
    return value[:TEXT_MAX] if isinstance(value, str) else value


_USUAL: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""What every record has; whatever else is there came by `extra`."""


class LineFormatter(logging.Formatter):
    """`time LEVEL logger event {fields}`: one shape for events and for what modules log."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 the library's name
        line = super().formatMessage(record)
        names = vars(record).keys() - _USUAL
        extra = {key: _cut(v) for key, v in vars(record).items() if key in names} if names else {}
        return f"{line} {_json(extra)}" if extra else line

    def format(self, record: logging.LogRecord) -> str:
        """A peer may have written a text in it: nothing in a log moves a terminal's cursor."""
        return _CONTROL.sub("\ufffd", super().format(record))


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error, which may go away before the node does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the library's name
        """Nobody reads any more: what is left in the buffer must not fail the exit either."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        else:
            super().handleError(record)


def configure_logging(level: str) -> None:
    """One line an event on standard error; libraries speak up from warnings on."""
    # No line names a thread, a process or a place in the code: to look them up is half of its cost.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 as logging's manual has it
    handler = _Terminal(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    _log.setLevel(level.upper())
