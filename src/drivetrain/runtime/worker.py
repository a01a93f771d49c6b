"""A worker process: runs the user's script in its main thread, on the one device it can see.

Started by the runtime as ``python -P -m drivetrain.runtime.worker --fd N`` with the control socket
inherited as N. Free of torch until the script is about to start.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any

from drivetrain.errors import DeviceLost, Moved
from drivetrain.runtime.agent import Agent
from drivetrain.runtime.audit import watch_entropy, watch_files
from drivetrain.runtime.channel import Channel, ChannelClosed, ProtocolError
from drivetrain.runtime.vendor import keep_devices
from drivetrain.store.crash import crash_point

_HARD_EXIT_S = 5.0
_DEVICE_ERRORS = (
    "CUDA error: uncorrectable ECC",
    "CUDA error: unspecified launch failure",
    "CUDA error: hardware",
    "CUDA error: GPU is lost",
    "CUDA error: unknown error",
    "CUDA error: device is busy or unavailable",
    "CUDA error: all CUDA-capable devices are busy",
    "HIP error: unspecified launch failure",
    "HIP error: unknown error",
)


def device_error(error: BaseException) -> bool:
    """True when ``error`` says that the device, not the script, failed.

    Out of memory and device-side asserts (an index out of range, say) are the script's own.
    """
    if isinstance(error, DeviceLost):
        return True
    text = str(error)
    return any(text.startswith(prefix) for prefix in _DEVICE_ERRORS)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch alike in every copy of the job."""
    random.seed(seed)
    try:
        import numpy as np
    except ImportError:
        pass
    else:
        np.random.seed(seed % 2**32)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(seed)


def _prepare(start: dict[str, Any]) -> None:
    spec = start["spec"]
    if start.get("cpus"):
        os.sched_setaffinity(0, start["cpus"])
    os.umask(spec["umask"])
    os.chdir(spec["cwd"])
    sys.argv = [spec["script"], *spec["args"]]
    # Python was told to put no folder first on the path (-P); the script expects its own there.
    sys.path.insert(0, str(Path(spec["script"]).parent))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _run_script(path: str) -> None:
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None)
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, module.__dict__)


def _exit_code(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def _register(agent: Agent) -> None:
    """Make the job's device torch's custom one, where torch has none for it."""
    if not agent.custom:
        return
    from drivetrain import hal
    from drivetrain.pytorch.devices import use

    # By uuid: in this process, where others are hidden, its index may be another.
    driver = agent.device.rpartition("/")[2].partition(":")[0]
    agent.torch_device = str(use(hal.device(f"{driver}://{agent.custom}")))


def _run(agent: Agent) -> dict[str, Any]:
    """Run the script; how it ended, as the ``exit`` event's fields."""
    from drivetrain.pytorch.late_compiler import load_compiler_late

    try:
        load_compiler_late()
        _register(agent)
        seed_everything(agent.seed)
        _run_script(agent.spec["script"])
    except Moved:
        return {"kind": "moved", "code": 0}
    except SystemExit as stop:
        return {"kind": "user", "code": _exit_code(stop.code)}
    except KeyboardInterrupt:
        return {"kind": "interrupted", "code": 130}
    except BaseException as error:
        if isinstance(error, SyntaxError):
            traceback.print_exception(error)
        else:
            # The frames of this module are no business of the script's author.
            frames = error.__traceback__
            while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
                frames = frames.tb_next
            traceback.print_exception(type(error), error, frames)
        kind = "device" if device_error(error) else "error"
        return {"kind": kind, "code": 1, "error": f"{type(error).__name__}: {error}"[:2000]}
    return {"kind": "user", "code": 0}


def main() -> None:
    """Entry point of a worker process."""
    parser = argparse.ArgumentParser(prog="drivetrain.runtime.worker")
    parser.add_argument("--fd", type=int, required=True)
    channel = Channel(socket.socket(fileno=parser.parse_args().fd))
    try:
        start = channel.wait(60.0).body
    except (ChannelClosed, ProtocolError):
        sys.exit(1)  # the runtime is gone before it said what to do: nothing was begun
    os.environ["DRIVETRAIN_ROLE"] = {"owner": "source"}.get(start["role"], start["role"])
    _prepare(start)
    agent = Agent(start, channel)
    agent.start()
    watch_files(agent)
    if agent.options.get("watch"):
        watch_entropy(agent)
    keep_devices(agent.notice)
    agent.event("hello", pid=os.getpid(), python=sys.version.split()[0])
    crash_point("worker.hello")
    ending = _run(agent)
    if ending["kind"] == "moved":
        # Threads of the script's own must not keep a copy alive that does not own the job.
        threading.Timer(_HARD_EXIT_S, os._exit, (0,)).start()
    agent.finished = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    crash_point("worker.exit")
    if agent.role == "owner" and (ending["kind"] in ("user", "error") or agent.ending):
        if agent.ending:
            ending = {**ending, "code": 1, "error": "its runtime died (--orphan exit)"}
        agent.record_end(ending)
    agent.event("exit", **ending, owner=agent.role == "owner", epoch=agent.epoch)
    agent.close()
    if ending["kind"] == "moved":
        sys.stdout.flush()
        os._exit(0)
    sys.exit(ending["code"])


if __name__ == "__main__":
    main()
