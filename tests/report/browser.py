"""A headless Chromium that opens a file and tells what happened: over the DevTools protocol, without packages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORDS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """A page in a browser of its own; ``said`` are its messages and errors, ``requests`` what it asked for."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")
        command = [CHROMIUM, *options, "--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.said: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        self._connect(profile / "DevToolsActivePort")
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def open(self, path: Path, width: int, *, scheme: str = "light", media: str = "") -> None:
        """Opens a file on a screen of a width, and waits until its scripts have run."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Page.navigate", url=path.as_uri())
        ready = "document.readyState === 'complete' && document.querySelectorAll('.chart:empty').length === 0"
        self.wait_for(f"location.protocol === 'file:' && {ready}")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} did not become true; {self.said}"
            time.sleep(0.1)

    def value(self, expression: str) -> Any:
        """Returns what an expression of JavaScript gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        self._send(json.dumps({"id": self._count, "method": method, "params": parameters}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("id") == self._count:
                return message["result"]
            if message.get("method") in WORDS:
                self.said.append(json.dumps(message["params"])[:500])
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    # -- a websocket (RFC 6455) ---------------------------------------------------------------------------------------

    def _connect(self, port_file: Path) -> None:
        end = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < end, "the browser did not start"
            time.sleep(0.1)
        port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            address = next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        key = base64.b64encode(os.urandom(16)).decode()
        head = (
            f"GET {address.split(str(port), 1)[1]} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket",
            "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(head).encode())
        self._file = self._socket.makefile("rb")
        while self._file.readline().strip():
            pass

    def _send(self, text: bytes) -> None:
        size = bytes([0x80 | len(text)]) if len(text) < 126 else bytes([0x80 | 126]) + struct.pack(">H", len(text))
        self._socket.sendall(b"\x81" + size + bytes(4) + text)  # A mask of zeros leaves the text as it is.

    def _receive(self) -> bytes:
        text, last = b"", False
        while not last:
            first, second = self._file.read(2)
            size, last = second & 127, bool(first & 0x80)
            if size >= 126:
                form, count = (">H", 2) if size == 126 else (">Q", 8)
                size = struct.unpack(form, self._file.read(count))[0]
            text += self._file.read(size)
        return text
