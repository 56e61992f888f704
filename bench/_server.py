"""A server in a process of its own, as users start it, and what the system says of its memory."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from satchel.core.units import parse_bytes

PATIENCE_S = 600  # for a server to start, and to leave


@dataclass(frozen=True)
class Served:
    """A server that takes requests."""

    port: int
    process: subprocess.Popen[str]
    log: Path  # what it wrote to stderr

    @property
    def peak_bytes(self) -> int:
        """The most that it held since its memory's limit is in force."""
        return high_water(self.process.pid)


@contextlib.contextmanager
def served(command: list[str], port: int = 0) -> Iterator[Served]:
    """Runs a server; ready when it takes connections on `port`, or, without one, says on stdout where it does. Ends it
    in good order after the block."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield Served(_wait(process, log, port) if port else _port(process, log), process, log)
        finally:
            leave(process)


def satchel(model: str, **options: object) -> list[str]:
    """The command that serves a model on a free port."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "satchel", "serve", "--model", model, "--port", "0", *words]


def least_bytes(model: str, **options: object) -> int:
    """The smallest memory that a server takes, as it says itself when it is given none to speak of."""
    done = subprocess.run(satchel(model, memory="1MiB", **options), capture_output=True, text=True, timeout=PATIENCE_S)
    found = re.search(r"needs\s+([\d.]+\s*\w?i?B)", " ".join((done.stdout + done.stderr).split()))
    if not found:
        raise RuntimeError(f"no refusal: {done.stdout}{done.stderr}")
    return parse_bytes(found[1].replace(" ", ""))


def leave(process: subprocess.Popen[str]) -> int:
    """Its exit code, after SIGTERM."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode


def high_water(pid: int | str) -> int:
    """The most bytes that a process ever held, or since it cleared the mark."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


def _wait(process: subprocess.Popen[str], log: Path, port: int) -> int:
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return port
        time.sleep(0.1)
    raise RuntimeError(log.read_text().strip()[-2000:] or "the server did not start")


def _port(process: subprocess.Popen[str], log: Path) -> int:
    for line in process.stdout or ():
        if found := re.search(r" is served at http://[^;]*:(\d+)", line):
            return int(found[1])
    process.wait()
    raise RuntimeError(log.read_text().strip() or "the server did not start")
