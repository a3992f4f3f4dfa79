"""A Python that has imported what takes seconds: programs that tests start run as forks of it, in place of new interpreters.

``warm_python`` (conftest.py) is a program that takes ``-m MODULE`` or a script and its words, as ``python`` does. It stays while the fork
runs, passes signals on to it and ends as it ends; where it is killed, so is the fork. Of a program's own imports this proves little:
``haste train``, a job, torchrun's ranks, a study and ``haste serve`` are also started without it somewhere.
"""

import contextlib
import json
import os
import selectors
import shlex
import signal
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def write_program(folder: Path, address: Path) -> Path:
    """The program, which asks at the socket ``address``."""
    program = folder / "python"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -ISs {__file__} {address} "$0" {shlex.quote(os.environ.get("PYTHONPATH", ""))} "$@"\n'
    )
    program.chmod(0o755)
    return program


def ask(address: str, program: str, words: list[str]) -> int:
    """What the program does: its fork runs ``words``; the fork's exit status. Imports little, for it is started often."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is somebody to pass them on to
    page = {"words": words, "program": program, "folder": os.getcwd(), "environment": dict(os.environ), "blocked": [*map(int, blocked)]}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"+"], [0, 1, 2])
        server.sendall(json.dumps(page).encode() + b"\n")
        answers = server.makefile("r")
        pid = int(answers.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, _frame: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        status = int(answers.readline())
    if status < 0:  # a signal ended it
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(address: str, parent: Connection) -> None:
    """Forks for whoever asks at ``address``, until the other end of ``parent`` is closed."""
    import gc

    # What Ray imports of others. Not Ray itself: it reads the environment once for all.
    import fsspec  # noqa: F401
    import google.protobuf.descriptor_pool  # noqa: F401
    import jsonschema  # noqa: F401
    import pandas  # noqa: F401
    import requests  # noqa: F401

    assert "ray" not in sys.modules
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # else it would wake nobody
    clients: dict[int, socket.socket] = {}  # by the process id of their fork
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as ready:
        listener.bind(address)
        listener.listen(64)
        for source in (listener, parent, woken):
            ready.register(source, selectors.EVENT_READ)
        parent.send("ready")
        while True:
            for key, _ in ready.select():
                if key.fileobj is parent:
                    for pid in clients:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj == woken:
                    os.read(woken, 512)
                elif key.fileobj is listener:
                    client, _ = listener.accept()
                    _, streams, *_ = socket.recv_fds(client, 1, 3)
                    page = json.loads(client.makefile("rb").readline())
                    pid = os.fork()
                    if not pid:
                        signal.set_wakeup_fd(-1)
                        for one in (listener, parent, ready, client, *clients.values()):
                            one.close()
                        become(page, streams)
                    for stream in streams:
                        os.close(stream)
                    client.sendall(f"{pid}\n".encode())
                    clients[pid] = client
                    ready.register(client, selectors.EVENT_READ, pid)
                elif key.data in clients:  # whoever asked is gone
                    os.kill(key.data, signal.SIGKILL)
                    ready.unregister(key.fileobj)
            for pid in list(clients):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with contextlib.suppress(KeyError, OSError), clients.pop(pid) as client:
                        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                        ready.unregister(client)


def become(page: dict[str, Any], streams: list[int]) -> NoReturn:
    """Runs what ``page`` asks for as the main module of this process, and ends it."""
    import atexit
    import importlib.util
    import threading
    import traceback

    status = 1
    try:
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for i, stream in enumerate(streams):
            os.dup2(stream, i)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
        os.chdir(page["folder"])
        os.environ.clear()
        os.environ.update(page["environment"])
        first, *words = page["words"]
        if first == "-m":
            name, *words = words
            sys.path[0], file = page["folder"], importlib.util.find_spec(name).origin  # type: ignore[union-attr]
        else:
            sys.path[0], file = os.path.dirname(first), first
        sys.argv, sys.executable = [str(file), *words], page["program"]  # what it starts in turn is warm, too
        spec: Any = importlib.util.spec_from_file_location("__main__", file)
        sys.modules["__main__"] = module = importlib.util.module_from_spec(spec)
        signal.pthread_sigmask(signal.SIG_SETMASK, page["blocked"])
        spec.loader.exec_module(module)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    address, program, path, *words = sys.argv[1:]
    asked = words[1:] if words[0] == "-u" else words
    if (asked[0] == "-m" or asked[0].endswith(".py")) and os.environ.get("PYTHONPATH", "") == path:  # else other code is meant
        sys.exit(ask(address, program, asked))
    os.execv(sys.executable, [sys.executable, *words])
