"""A headless Chromium, driven by its DevTools protocol over a pair of pipes, without a library.

Each message is JSON and ends with a zero byte. The browser reads descriptor 3 and writes 4.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60.0  # for an answer
FLAGS = (
    "--headless",
    "--no-sandbox",  # a container has no user namespaces, and root may not run with a sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# What tells of errors on a page.
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Chromium:
    """A browser with one page."""

    def __init__(self, profile: Path):
        assert PROGRAM
        reads_from, self._to = os.pipe()
        self._from, writes_to = os.pipe()
        script = f'exec "$@" 3<&{reads_from} 4>&{writes_to}'
        command = ["bash", "-c", script, "bash", PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(reads_from, writes_to),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reads_from)
        os.close(writes_to)
        self._number = 0
        self._received = b""
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    # --- the protocol

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a method of the protocol answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], SECONDS)
            assert ready, "the browser does not answer"
            data = os.read(self._from, 2**20)
            assert data, "the browser has ended"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    # --- the page

    def open(self, path: Path, fragment: str = "", width: int = 1280, height: int = 900) -> None:
        """Load a file as a new page."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.emulate()
        self.call("Page.navigate", url="about:blank")  # a new fragment alone loads nothing
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri() + fragment)
        self.wait_for("location.protocol == 'file:' && document.readyState == 'complete'")

    def emulate(self, scheme: str = "light", media: str = "") -> None:
        """A reader who prefers a light or a dark scheme, on a screen or on paper ("print")."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """What JavaScript says. The page's policy does not hold for it."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, (expression, found)
        return found["result"].get("value")

    def box(self, selector: str) -> dict[str, float]:
        """The place of an element on the screen, to which the page is scrolled."""
        found: dict[str, float] = self.value(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{block: "center", behavior: "instant"}});
                const {{left, top, width, height}} = element.getBoundingClientRect();
                return {{left, top, width, height}};
            }})()"""
        )
        return found

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`kind` is mouseMoved, mousePressed or mouseReleased."""
        button = "none" if kind == "mouseMoved" else "left"
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1, buttons=1
        )

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": name} if len(name) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, **text)

    def complaints(self) -> list[dict[str, Any]]:
        self.value("1")  # what came before it is here then
        return [event for event in self.events if event["method"] in COMPLAINTS]

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        urls = []
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent":
                urls.append(event["params"]["request"]["url"])
        return urls

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])
