"""Processes that cost no imports: forked from one that has torch, transformers, peft and trl already.

Each is a process of its own, with its folder, environment, memory, signals and exit code; what it doesn't try is the
import. So the main job, a stopped run and Unsloth (which wants to come first) are tried in new interpreters.
"""

import atexit
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy

COMMAND = "from qlora_nb.cli import main; main()"
spent = 0.0  # CPU seconds of all that ended; conftest counts them for the test that waited


class Process:
    """A forked process that runs `code`, with the part of subprocess.Popen that the tests use.

    With `preload`, a shared library, it is forked from a server of its own that has this library preloaded.
    """

    def __init__(self, code, *arguments, cwd, env=None, without=(), input="", first="", preload=""):
        self._place = Path(tempfile.mkdtemp(prefix="forked-"))
        (self._place / "in").write_text(input, encoding="utf-8")
        request = {
            "code": f"{first}\n{code}",
            "cwd": str(cwd),
            "env": {name: value for name, value in {**os.environ, **(env or {})}.items() if name not in without},
            "place": str(self._place),
        }
        self._preload = str(preload)
        self.pid = _ask(self._preload, start=request | {"arguments": [str(a) for a in arguments]})["pid"]
        self.args, self.returncode = [code, *arguments], None

    def poll(self):
        global spent
        if self.returncode is None and (ended := _ask(self._preload, poll=self.pid)):
            self.returncode = ended["code"]
            spent += ended["seconds"]
        return self.returncode

    def send_signal(self, which):
        os.kill(self.pid, which)

    def communicate(self, timeout=400):
        "(stdout, stderr), when it has ended; killed after `timeout` seconds."
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        texts = tuple((self._place / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
        shutil.rmtree(self._place)
        return texts


def run(code, *arguments, timeout=400, **more):
    "As subprocess.run with captured text."
    process = Process(code, *arguments, **more)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def qlora_nb(*arguments, cwd, **more):
    "The command line."
    return run(COMMAND, *arguments, cwd=cwd, **more)


def wait_for(process, path, lines, meanwhile=lambda: time.sleep(0.01)):
    "Until a file of a process's run has so many lines."
    limit = time.time() + 240
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert process.poll() is None and time.time() < limit
        meanwhile()


_SERVERS = {}  # by what is preloaded


def run_script(path, *arguments, **more):
    "A file of Python, as the program that runs."
    return run(f"import runpy, sys; sys.argv[0] = {str(path)!r}; runpy.run_path(sys.argv[0], run_name='__main__')",
               *arguments, **more)  # fmt: skip


def _ask(preload, **request):
    "One question to the server, which starts with the first."
    global spent
    if preload not in _SERVERS:
        server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  env={**os.environ, "LD_PRELOAD": preload} if preload else None)  # fmt: skip
        _SERVERS[preload] = server
        atexit.register(server.kill)
        if not (first := server.stdout.readline()):
            raise RuntimeError(f"tests/processes.py did not start: {sys.executable} {__file__} says why")
        spent += json.loads(first)
    server = _SERVERS[preload]
    server.stdin.write(json.dumps(request).encode() + b"\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


# --- the server -----------------------------------------------------------------------------------------------------


def load():
    "Import what the commands import."
    os.environ.setdefault("MPLBACKEND", "agg")
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    import qlora_nb.cli
    import qlora_nb.workflow  # noqa: F401

    del os.environ["MPLBACKEND"]
    gc.collect()
    gc.freeze()  # for good: a collection in a fork leaves alone, and so doesn't copy, what was imported


def become(request):
    "In the fork: folder, environment, files and arguments of the new process."
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, mode) in enumerate((("in", os.O_RDONLY), ("out", write), ("err", write))):
        os.dup2(os.open(f"{request['place']}/{name}", mode, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, and under nohup, both are ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.stdin = open(0, encoding="utf-8")
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    random.seed(os.urandom(8))
    numpy.random.seed(int.from_bytes(os.urandom(4)))
    sys.argv[1:], sys.path[0] = request["arguments"], request["cwd"]


def serve():
    "Answer until the input ends; return the code to run in a fork."
    requests = os.fdopen(os.dup(0), "rb")
    while line := requests.readline():
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                become(request["start"])
                return request["start"]["code"]
            answer = {"pid": pid}
        else:
            pid, status, usage = os.wait4(request["poll"], os.WNOHANG)
            seconds = usage.ru_utime + usage.ru_stime
            answer = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds} if pid else None
        os.write(1, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def leave(error):
    "End as an interpreter does, but without its last two seconds, in which it takes apart what was imported."
    code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
    if not isinstance(error, SystemExit | None):
        sys.excepthook(type(error), error, error.__traceback__)
    elif not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # none where the terminal was closed
        stream.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 255)


if __name__ == "__main__":
    outputs = os.dup(1), os.dup(2)
    for number in (1, 2):  # what imports print
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    try:
        load()
    finally:
        os.dup2(outputs[0], 1), os.dup2(outputs[1], 2)
    os.write(1, f"{time.process_time()}\n".encode())
    error = None
    try:
        exec(compile(serve(), "<command>", "exec"), {"__name__": "__main__"})
    except BaseException as raised:
        error = raised
    leave(error)
