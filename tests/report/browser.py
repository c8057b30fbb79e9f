"""A real browser for tests of the report page: headless Chromium, driven over a pipe by its own protocol.

with Browser() as browser:
    page = browser.open(path)
    page.press("Tab")
    assert page.ask("document.activeElement.textContent") == "Skip to the samples"
    assert page.problems == []
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
TIMEOUT_S = 120

_WITH_PIPE = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Runs a command with its pipe at the descriptors where the browser looks for it."""

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
)
_CODES = {
    "Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """One browser process with one page."""

    def __enter__(self) -> Browser:
        with ExitStack() as opened:
            profile = opened.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            read_here, write_there = os.pipe()
            read_there, write_here = os.pipe()
            self._from = opened.enter_context(os.fdopen(read_here, "rb"))
            self._to = opened.enter_context(os.fdopen(write_here, "wb"))
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _WITH_PIPE, str(read_there), str(write_there)),
                    *("timeout", str(TIMEOUT_S), str(CHROMIUM), *_FLAGS.split()),
                    *(f"--user-data-dir={profile}", "about:blank"),
                ],
                pass_fds=(read_there, write_there),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            opened.callback(self._process.wait)
            opened.callback(self._process.terminate)
            os.close(read_there)
            os.close(write_there)
            self._number, self._rest = 0, b""
            self.events: list[dict[str, Any]] = []
            targets = self.call("Target.getTargets")["targetInfos"]
            target = next(target["targetId"] for target in targets if target["type"] == "page")
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable", page=True)
            self.call("Page.setLifecycleEventsEnabled", page=True, enabled=True)
            self.call("Emulation.setScrollbarsHidden", page=True, hidden=True)  # a picture shows none either
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def call(self, method: str, *, page: bool = False, **parameters: Any) -> dict[str, Any]:
        """Ask the browser, or its page, and wait for the answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._to.write(json.dumps(message | ({"sessionId": self._session} if page else {})).encode() + b"\0")
        self._to.flush()
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Load a file and wait until it is drawn."""
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", page=True, features=theme)
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", page=True, **screen)
        self.events.clear()
        loader = self.call("Page.navigate", page=True, url=path.absolute().as_uri())["loaderId"]
        loaded = {"name": "load", "loaderId": loader}
        while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(self._next())
        page = Page(self)
        page.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._from.fileno(), 1 << 20)
            if not read:
                raise RuntimeError(f"the browser ended, or {TIMEOUT_S} s were over")
            self._rest += read
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


class Page:
    """What is open in the browser."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        answer = self._browser.call(
            "Runtime.evaluate", page=True, expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys of a keyboard, one after the other."""
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
            code = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": _CODES[key]}
            self._browser.call("Input.dispatchKeyEvent", page=True, type="keyDown", **code, **text)
            self._browser.call("Input.dispatchKeyEvent", page=True, type="keyUp", **code)

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the mouse to the middle of the first element that matches; press it there."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.ask(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        at = {"x": box[0], "y": box[1]}
        self._browser.call("Input.dispatchMouseEvent", page=True, type="mouseMoved", **at)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                pressed = {"button": "left", "clickCount": 1}
                self._browser.call("Input.dispatchMouseEvent", page=True, type=kind, **at, **pressed)

    def picture(self, path: Path, selector: str = "body") -> None:
        """A picture of one element, whether on the screen or not."""
        clip = self.ask(
            f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height, scale: 1}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        taken = self._browser.call(
            "Page.captureScreenshot", page=True, format="png", clip=clip, captureBeyondViewport=True
        )
        path.write_bytes(base64.b64decode(taken["data"]))

    @property
    def problems(self) -> list[dict[str, Any]]:
        """What the console says, and scripts that broke."""
        told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        self.ask("0")
        return [event["params"] for event in self._browser.events if event.get("method") in told]
