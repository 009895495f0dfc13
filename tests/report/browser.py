"""Headless Chromium, spoken to through a pipe: open a page, ask it something, see what it complained about."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs a browser: chromium (Debian's package) or Chrome")


class Browser:
    """A browser with one page; `complaints` are errors that its console showed and requests that it made."""

    def __init__(self, profile):
        to_browser, from_browser = os.pipe(), os.pipe()
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
        words = [PROGRAM, *flags, f"--user-data-dir={profile}", "--window-size=1280,1600", "about:blank"]
        line = f'exec 3<&{to_browser[0]} 4>&{from_browser[1]}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *words],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._to, self._from = os.fdopen(to_browser[1], "wb", 0), os.fdopen(from_browser[0], "rb", 0)
        self._number, self._rest, self._session = 0, b"", None
        self.complaints = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{name}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._to.close()
        self._process.kill()
        self._process.wait()
        self._from.close()

    def call(self, method, **parameters):
        """A command of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self._note(found)

    def _read(self):
        while b"\0" not in self._rest:
            piece = self._from.read(1 << 20)
            assert piece, "the browser is gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            self.complaints.append(f"asks for {told['request']['url']}")

    def open(self, path, seconds=60):
        """Load a report and wait until it is drawn; how long that took, in seconds."""
        started = time.monotonic()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.ask(
            "document.body && (document.body.dataset.ready || document.querySelector('.failed')?.textContent)"
        ):
            assert time.monotonic() - started < seconds, self.complaints
            time.sleep(0.02)
        return time.monotonic() - started

    def ask(self, expression):
        """The value of a JavaScript expression (awaited if it is a promise)."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path, height):
        """The page's upper part as PNG."""
        clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def print(self, path):
        """The page as PDF."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))
