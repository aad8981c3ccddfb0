"""Waiting, in tests: a test may fail, not hang, and may take what a loaded machine takes."""

import time

LIMIT = 600
"""Seconds. Far more than anything takes: no test is about how long something takes."""


def until(ready, process=None, log=None, pause=0.1):
    """Waits until something is so; fails at once where the process that makes it so has ended."""
    deadline = time.monotonic() + LIMIT
    while not (found := ready()):
        said = log.read_text()[-3000:] if log else ""
        if process is not None and process.poll() is not None:
            said = said or (process.stderr.read() if process.stderr else "")
            raise AssertionError(f"ended with {process.returncode}: {said}")
        assert time.monotonic() < deadline, said or "not ready"
        time.sleep(pause)
    return found
