"""Commands of `dp-lora` in processes of their own that start in no time.

Importing torch and diffusers takes a command several times as long as what most tests ask of it. `Nursery` is
a process that has imported them; a command is a fork of it, with a session, a folder, an environment and an
output of its own, and can be killed like any other process.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "scipy.signal", "dp_lora.__main__", "dp_lora.jobs.settings", "dp_lora.training.finetune", "sweeps.report",
    "sweeps.cluster.pool", "sweeps.cluster.slurm",
)  # fmt: skip


class Forked:
    """A command that runs; `poll`, `wait`, `send_signal`, `pid` and `returncode` are those of `Popen`."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("dp-lora", timeout or 0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process alone, not to its children as Ctrl-C in a terminal does."""
        os.kill(self.pid, number)


class Nursery:
    """Starts commands as forks of a process that has imported all they need.

    Args:
        folder: for the exit statuses of the commands.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.builders.forked"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def start(self, words: Sequence[str], output: Path, cwd: Path, environment: Mapping[str, str]) -> Forked:
        """`dp-lora` with these words; what it prints goes to the file `output`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        status = self._folder / f"status{self._count}"
        output.touch()
        asked = {"words": list(words), "output": str(output), "cwd": str(cwd), "status": str(status),
                 "environment": dict(environment)}  # fmt: skip
        self._process.stdin.write(f"{json.dumps(asked)}\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), status)

    def team(self, words: Sequence[str], count: int, folder: Path) -> list[tuple[int, str]]:
        """The command in `count` processes of one job, as torchrun starts it: status and output of each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        running = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            output = folder / f"rank{rank}.txt"
            running.append((self.start(words, output, folder, os.environ | address | own), output))
        return [(process.wait(900), output.read_text()) for process, output in running]

    def end(self) -> None:
        """Ends the nursery, which waits for its commands."""
        self._process.communicate()


def _serve() -> None:
    """The nursery: forks a command for each line on stdin, and records how each of them ended."""
    for module in IMPORTED:
        importlib.import_module(module)
    running: dict[int, Path] = {}
    unread, asks = b"", True
    while asks or running:
        if not asks:
            time.sleep(0.02)
        elif select.select([0], [], [], 0.02)[0]:
            part = os.read(0, 1 << 16)
            unread, asks = unread + part, bool(part)
        *lines, unread = unread.split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if not (pid := os.fork()):
                _become(asked)
            running[pid] = Path(asked["status"])
            os.write(1, f"{pid}\n".encode())
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                path = running.pop(ended[0])
                path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(ended[1])))
                path.with_suffix(".new").rename(path)


def _become(asked: Mapping[str, Any]) -> NoReturn:
    """Turns the fork into the command, with which it ends."""
    os.setsid()
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["dp-lora", *asked["words"]]
        from dp_lora.__main__ import main

        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
