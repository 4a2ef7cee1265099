"""Headless Chromium for tests, driven by the DevTools protocol over a pipe: no port, no driver, no library.

with Chromium(folder) as browser:
    page = browser.open("http://127.0.0.1:9474/")
    page.until("document.title")
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.needs import absent, needs

_PROGRAMS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    # root has no user namespace to put its sandbox into, and what is shown is made by this test
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--no-proxy-server",
)
_DEADLINE = 60.0
"""Seconds for an answer or a condition: a busy machine is ten times slower than a quiet one."""


class ChromiumError(Exception):
    """The browser does not answer; the text says what it wrote."""


def program() -> str:
    """The path of the browser. Skips the test where there is none; in CI it fails."""
    return next(filter(None, map(shutil.which, _PROGRAMS)), "") or absent("chromium", "chromium")


@needs("browser")
class Chromium:
    """One browser process with a profile of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "chromium.log"
        self._read, out = os.pipe()
        into, self._write = os.pipe()
        argv = [program(), *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        with self._log.open("wb") as log:
            # it reads commands from 3 and writes answers to 4, whatever these are here; it ends when the pipes do
            self._process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{into} 4>&{out}', "bash", *argv],
                pass_fds=(into, out),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"HOME": str(folder), "TZ": "UTC", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        os.close(into)
        os.close(out)
        self._buffer = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it and all its children."""
        for fd in (self._read, self._write):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_DEADLINE)

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Return the result of one command; what else arrives meanwhile is kept in `events`."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + _DEADLINE
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise ChromiumError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise ChromiumError(f"{what}: no answer for {_DEADLINE:.0f} s; {self._said()}")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise ChromiumError(f"{what}: it has ended; {self._said()}")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _said(self) -> str:
        return f"it wrote: {self._log.read_text(errors='replace')[-1000:]}"

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Load a page in a context of its own, with no cache and no history."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, context, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.until("location.href !== 'about:blank' && document.readyState === 'complete'")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, context: str, session: str) -> None:
        self._browser, self._context, self._session = browser, context, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def js(self, expression: str) -> Any:
        """Return the value of an expression, as JSON carries it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise ChromiumError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + _DEADLINE
        while not (value := self.js(expression)):
            if time.monotonic() > deadline:
                text = self.js("document.body.innerText")
                raise ChromiumError(f"not true for {_DEADLINE:.0f} s: {expression}\n{text[:3000]}")
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """Return the text of an element, as it is seen."""
        return str(self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    def rows(self, selector: str) -> list[list[str]]:
        """Return the texts of the cells of each row of a table's body."""
        found: list[list[str]] = self.js(
            f"[...document.querySelectorAll({json.dumps(selector + ' tbody tr')})]"
            ".map(row => [...row.cells].map(cell => cell.innerText))"
        )
        return found

    def complaints(self) -> Sequence[str]:
        """Return what the page has logged as errors: exceptions, and what its policy has refused."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["source"] in ("security", "violation"):
                found.append(str(parameters["entry"]["text"]))
        return found

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a picture."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)
