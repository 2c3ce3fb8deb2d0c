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

import trio

TEXT_MAX: Final = 500
TOGETHER_SECONDS: Final = 0.05
"""What a kill may cost of the lines of `emit_often`: written one by one, each costs three times as
much as with others, since all that writes it has left the processor's caches by then."""
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
        self._unwritten: list[tuple[float, str, dict[str, Any]]] = []
        self._has_unwritten = trio.Event()
        self._has_writer = False

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
        self._write_all()
        fields = self._recorded(name, fields)
        if _log.isEnabledFor(level):
            _log.log(level, "%s %s", name, _json(fields), exc_info=exc_info)

    def emit_often(self, name: str, **fields: Any) -> None:
        """As `emit`, for what happens at every small job: its line is written with others'.

        It bears the time of the event, and no line of a later one is written before it.
        """
        if not self._has_writer:
            self.emit(name, **fields)
            return
        self._unwritten.append((time.time(), name, self._recorded(name, fields)))
        self._has_unwritten.set()

    async def write_together(self) -> None:
        """Writes the lines of what happens often, after `TOGETHER_SECONDS` at the latest."""
        self._has_writer = True
        try:
            while True:
                await self._has_unwritten.wait()
                await trio.sleep(TOGETHER_SECONDS)
                self._has_unwritten = trio.Event()
                self._write_all()
        finally:
            self._has_writer = False
            self._write_all()

    def _recorded(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        """What is kept of an event's fields."""
        fields = {key: _cut(value) for key, value in fields.items()}
        self.counts[name] += 1
        self.recent.append((time.time(), name, fields))
        return fields

    def _write_all(self) -> None:
        lines, self._unwritten = self._unwritten, []
        for at, name, fields in lines if _log.isEnabledFor(logging.INFO) else ():
            values = name, _json(fields)
            record = _log.makeRecord(_log.name, logging.INFO, "", 0, "%s %s", values, None)
            record.created, record.msecs = at, 1000 * (at % 1)
            _log.handle(record)


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
