"""Chromium without a window, driven over its DevTools protocol: as much as the tests of a page need."""

import base64
import itertools
import json
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

SECONDS = 60
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, "")}


class Browser:
    """A page in a browser of its own, whose profile lies in ``folder``."""

    def __init__(self, program: str, folder: Path):
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-port=0",
        ]
        self._process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={folder / 'profile'}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port_file, end = folder / "profile" / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert time.monotonic() < end, "Chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as answer:
            address = next(page["webSocketDebuggerUrl"] for page in json.loads(answer.read()) if page["type"] == "page")
        self._socket = connect(address, max_size=2**26)
        self._numbers, self._events = itertools.count(1), []  # type: ignore[var-annotated]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, address: str, width: int, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.ask(condition):
            assert time.monotonic() < end, f"never became true: {condition}; {self.ask('document.body.innerText')}"
            time.sleep(0.05)

    def write(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def key(self, name: str, control: bool = False) -> None:
        code, text = KEYS[name]
        about = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 2 if control else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text and not control else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def errors(self) -> list[str]:
        """Errors of scripts, what the page's policy blocked, and requests to other hosts than the page's; not the statuses of answers."""
        found = []
        own = self.ask("location.origin")
        for event in self._events:
            about = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(about["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and about["entry"]["level"] == "error" and about["entry"]["source"] != "network":
                found.append(about["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                address = about["request"]["url"]
                if not address.startswith((own, "data:")):
                    found.append(address)
        return found

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._events.append(message)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(SECONDS)
