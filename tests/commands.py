"""Our commands in processes of their own, forked from one that has imported torch and the rest already.

`call` does what a shell does with ``python -m fer.<command> WORDS``, without the 8 CPU seconds that imports cost each
time. Tests of what a fresh process imports, of launchers, signals and several devices start real ones.
"""

import atexit
import gc
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

# For those forked from here.
IMPORTED = ("fer.experiment", "albumentations", "facenet_pytorch", "matplotlib.pyplot", "scipy.stats")

_started: list["subprocess.Popen[str]"] = []


def call(command: str, *words: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """One command line.

    Args:
        command: its name: ``train``.
        words: its arguments.
        cwd: the folder it runs in.
        environment: variables, set besides this process's.

    Returns:
        Its exit code and what it printed.
    """
    if not _started or _started[0].poll() is not None:
        _started[:] = [_start()]
    server = _started[0]
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        asked = {"module": f"fer.{command}", "words": words, "cwd": str(cwd), "place": place}
        print(json.dumps({**asked, "environment": {**os.environ, **environment}}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        printed = [(Path(place) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(["python", "-m", asked["module"], *words], code, *printed)


def _start() -> "subprocess.Popen[str]":
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(_stop, started)
    return started


def _stop(server: "subprocess.Popen[str]") -> None:
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:  # a process that was forked from this one holds its input open
        server.kill()


def _become(asked: dict[str, Any]) -> NoReturn:
    """Turn this child into the command."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(asked["place"]) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["module"], *asked["words"]]
    if "wandb" in sys.modules:  # its folder for media belongs to the parent, and the child before has removed it
        from wandb.sdk.data_types._private import MEDIA_TMP

        Path(MEDIA_TMP.name).mkdir(exist_ok=True)
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


def _serve() -> None:
    for name in IMPORTED:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there is not looked through in every child, which would copy it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    sys.path[0] = ""  # as after python -m: the folder the command runs in, not this one
    _serve()
