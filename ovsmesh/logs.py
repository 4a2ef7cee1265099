"""How a log line looks: text with a time and its zone, JSON, and for journald a severity in front (sd-daemon(3)).

Each record is one printable line, whatever names and error texts of others are in it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import TextIO

from ovsmesh.text import printable

FORMATS = ("text", "json")
_MOST = 8000
"""Characters of a line: journald and Docker cut at 48 KiB and 16 KiB."""
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Level → syslog priority; below is 7, debug."""


class LineFormatter(logging.Formatter):
    """Formats a record as one line of text or JSON, for journald or another reader."""

    def __init__(self, form: str = "text", journal: bool = False) -> None:
        super().__init__()
        self._json, self._journal = form == "json", journal

    @property
    def plain(self) -> bool:
        """Whether a person reads the lines as they are."""
        return not (self._json or self._journal)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}: {' | '.join(self.formatException(record.exc_info).splitlines())}"
        if self._json:
            line = self._object(record, text[:_MOST])
        elif self._journal:
            # journald has its own time, and shows the severity its own way
            line = printable(text, _MOST, " ")
        else:
            at = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")
            line = f"{at} {record.levelname} {printable(text, _MOST, ' ')}"
        return f"<{_priority(record.levelno)}>{line}" if self._journal else line

    def _object(self, record: logging.LogRecord, text: str) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        found = {"time": time, "level": record.levelname.lower(), "message": text}
        # an entry of the history: what can be searched for
        entry = getattr(record, "entry", None)
        if entry is not None:
            about = {"event": str(entry.event), "what": entry.what, "who": entry.who, "took": entry.took}
            found |= {key: value for key, value in about.items() if value not in ("", None)}
        return json.dumps(found)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def is_journal(stream: TextIO) -> bool:
    """Return whether journald reads the stream: $JOURNAL_STREAM then names its device and inode (systemd.exec(5))."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def to_stderr(level: str, form: str) -> None:
    """Log to standard error from now on. `level` as in "info"; `form` is one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(form, is_journal(sys.stderr)))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # a log that can't be written is no reason to write more
    logging.raiseExceptions = False


def fail(text: str) -> None:
    """Write the error that ends a command to standard error, in the format of its log if that is for a machine."""
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    if any(isinstance(each, LineFormatter) and not each.plain for each in formatters):
        logging.getLogger("ovsmesh").error("%s", text)
    else:
        print(f"ovsmesh: {text}", file=sys.stderr)
