"""The command line, in forks of a process that has imported everything.

Each is a process of its own: it is killed like any other, ends with the code of the command, and
shares no state with the next. Only the seconds of imports are paid once.
"""

import atexit
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from waiting import LIMIT

CLEAN = ("MLFLOW", "PREFECT", "AWS", "HALFSTEP")
"""Beginnings of variables that a test sets itself, or not at all."""
IMPORTED = ("audit.lookup", "audit.report", "audit.trail", "audit.verify", "flows.launch",
            "flows.show", "sklearn", "datasets", "torch._dynamo")  # fmt: skip
"""Not Prefect: it reads its settings when it is imported."""


def _clean():
    return {k: v for k, v in os.environ.items() if not k.startswith(CLEAN)}


class Forked:
    """One command, as `subprocess.Popen` shows a process. What it prints goes to files."""

    def __init__(self, arguments, environment=None, cwd=None):
        out, err = _template().files()
        self.stdout, self.stderr = (_Reader(path) for path in (out, err))
        self.pid = _template().fork(
            [str(argument) for argument in arguments],
            {**_clean(), **(environment or {})},
            str(cwd or Path.cwd()),
            str(out),
            str(err),
        )

    @property
    def returncode(self):
        """As `subprocess` says it: the negative number of the signal that killed it."""
        return _template().ended.get(self.pid)

    def poll(self):
        return self.returncode

    def wait(self, timeout=LIMIT):
        return _template().wait(self.pid, timeout)

    def communicate(self, timeout=LIMIT):
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(9)


class _Reader:
    def __init__(self, path):
        self._path = path

    def read(self):
        return self._path.read_text() if self._path.exists() else ""


def run(*arguments, cwd=None, **environment):
    """As `subprocess.run` with text captured."""
    process = Forked(arguments, environment, cwd)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class _Template:
    """The process that forks, and who of its children has ended."""

    def __init__(self):
        self.ended = {}
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._forked = []
        self._folder, self._numbers = Path(tempfile.mkdtemp()), itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=_clean(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self.close)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def files(self):
        """Where a command may print to."""
        number = next(self._numbers)
        return self._folder / f"{number}.out", self._folder / f"{number}.err"

    def fork(self, *request):
        with self._asking, self._changed:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            assert self._changed.wait_for(lambda: self._forked, LIMIT), "it does not fork"
            return self._forked.pop()

    def wait(self, pid, timeout):
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self.ended, timeout):
                raise subprocess.TimeoutExpired(f"process {pid}", timeout)
            return self.ended[pid]

    def _listen(self):
        for line in self._process.stdout:
            what, pid, code = json.loads(line)
            with self._changed:
                if what == "forked":
                    self.ended.pop(pid, None)  # a number that an earlier one had
                    self._forked.append(pid)
                else:
                    self.ended[pid] = code
                self._changed.notify_all()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._listener.join()
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


_MADE = []


def _template():
    if not _MADE:
        _MADE.append(_Template())
    return _MADE[0]


def serve():
    """What the template runs: forks for each request, tells of each end."""
    import select
    import signal

    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    before = set(os.environ)
    for name in IMPORTED:
        importlib.import_module(name)
    added = {k: v for k, v in os.environ.items() if k not in before}  # what imports set
    main = importlib.import_module("flows.cli").main

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def tell(*what):
        os.write(1, (json.dumps(what) + "\n").encode())

    pending = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                tell("ended", pid, os.waitstatus_to_exitcode(status))
        if 0 not in ready:
            continue
        data = os.read(0, 65536)
        if not data:
            return None
        pending += data
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            pid = os.fork()
            if pid:
                tell("forked", pid, None)
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _become(main, added, *json.loads(line))


def _become(main, added, arguments, environment, cwd, out, err):
    """The command, in this process."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update({**added, **environment})
    os.chdir(cwd)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["halfstep", *arguments]
    return main()


if __name__ == "__main__":
    sys.exit(serve())
