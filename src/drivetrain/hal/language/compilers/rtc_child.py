"""NVRTC or hiprtc, in a process of its own: reads ``job.json`` here, writes ``result.json``.

Run as a script by `rtc.py`; it imports nothing of the package. Both libraries have the same
functions under two prefixes.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

_OK = 0
_HALVES = ("half", "__half")
"""Types that other targets know without their header."""
_BEFORE_11_2 = [35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80]
"""What CUDA 11.0 compiles for; it cannot be asked."""


def _function(library: ctypes.CDLL, name: str, *types: Any) -> Any:
    found = getattr(library, name)
    found.argtypes, found.restype = types, ctypes.c_int
    return found


class _Rtc:
    def __init__(self, job: dict[str, Any]) -> None:
        for path in job["preload"]:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(job["library"])
        self.prefix: str = job["prefix"]
        self.failed = ""

    def has(self, name: str) -> bool:
        return hasattr(self.library, self.prefix + name)

    def call(self, name: str, *arguments: Any, types: tuple[Any, ...]) -> int:
        status = int(_function(self.library, self.prefix + name, *types)(*arguments))
        if status != _OK and not self.failed:
            self.failed = self.prefix + name
        return status

    def word(self, status: int) -> str:
        found = getattr(self.library, self.prefix + "GetErrorString")
        found.argtypes, found.restype = (ctypes.c_int,), ctypes.c_char_p
        text = found(status)
        return text.decode(errors="replace") if text else str(status)

    def blob(self, program: ctypes.c_void_p, name: str) -> bytes:
        """What ``Get<name>Size`` and ``Get<name>`` give; empty where there is none."""
        if not self.has(f"Get{name}"):
            return b""
        size = ctypes.c_size_t()
        reference = ctypes.POINTER(ctypes.c_size_t)
        types: tuple[Any, ...] = (ctypes.c_void_p, reference)
        getter = _function(self.library, f"{self.prefix}Get{name}Size", *types)
        if getter(program, ctypes.byref(size)) != _OK or not size.value:
            return b""
        data = ctypes.create_string_buffer(size.value)
        getter = _function(
            self.library, f"{self.prefix}Get{name}", ctypes.c_void_p, ctypes.c_char_p
        )
        return data.raw if getter(program, data) == _OK else b""

    def architectures(self) -> list[int]:
        """Numbers as in ``sm_90``."""
        if not self.has("GetSupportedArchs"):
            return _BEFORE_11_2 if self.version() < [11, 1] else [*_BEFORE_11_2, 86]
        count, reference = ctypes.c_int(), ctypes.POINTER(ctypes.c_int)
        if self.call("GetNumSupportedArchs", ctypes.byref(count), types=(reference,)) != _OK:
            return []
        found = (ctypes.c_int * count.value)()
        if self.call("GetSupportedArchs", found, types=(reference,)) != _OK:
            return []
        return list(found)

    def version(self) -> list[int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        reference = ctypes.POINTER(ctypes.c_int)
        pair = (ctypes.byref(major), ctypes.byref(minor))
        self.call("Version", *pair, types=(reference, reference))
        return [major.value, minor.value]


def _architecture(asked: str, known: list[int], real: bool) -> str:
    """The option's value for ``sm_90``: real where the library can, else the next virtual one.

    Empty when it knows only newer ones.
    """
    if not asked.startswith("sm_"):
        return asked
    number = int("".join(c for c in asked if c.isdigit()))
    if number in known and real:
        return asked
    older = [arch for arch in known if arch <= number]
    return f"compute_{max(older)}" if older else ""


def _headers(rtc: _Rtc, job: dict[str, Any]) -> list[str]:
    """Options for the headers that come inside NVRTC, from 13.3; none when there are none.

    Writing them takes a second, so only who needs them has them.
    """
    if not job["bundled"] or not rtc.has("InstallBundledHeaders"):
        return []
    said = ctypes.c_char_p()
    types = (ctypes.c_char_p, ctypes.c_uint, ctypes.POINTER(ctypes.c_char_p))
    folder = Path("headers").resolve()
    where = str(folder).encode()
    if rtc.call("InstallBundledHeaders", where, 0, ctypes.byref(said), types=types) != _OK:
        return []
    return [f"--include-path={folder}", f"--include-path={folder / 'cccl'}"]


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    rtc = _Rtc(job)
    result: dict[str, Any] = {"log": ""}
    if job["prefix"] == "nvrtc":
        result |= {"version": rtc.version(), "known": rtc.architectures()}
    result["arch"] = _architecture(job["arch"], result.get("known", []), rtc.has("GetCUBIN"))
    if not result["arch"]:
        return {**result, "status": 5, "word": "architecture"}
    options = [*job["options"], f"--gpu-architecture={result['arch']}"]
    result |= _tried(rtc, job, options, job["names"])
    if result["status"] != _OK and any(f'"{w}" is undefined' in result["log"] for w in _HALVES):
        options = [*options, *job["halves"]]
        result |= _tried(rtc, job, options, job["names"])
    if result["status"] != _OK and "open source file" in result["log"]:
        found = _headers(rtc, job)
        if found:
            options = [*found, *options]
            result |= _tried(rtc, job, options, job["names"])
    if result["status"] != _OK and job["names"]:
        # A name may be wrong: the source was scanned without its headers. Then it goes unnamed.
        result |= _tried(rtc, job, options, [])
    return {**result, "word": rtc.word(result["status"]), "call": rtc.failed}


def _tried(
    rtc: _Rtc, job: dict[str, Any], options: list[str], expressions: list[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {"log": ""}
    rtc.failed = ""
    program = ctypes.c_void_p()
    names = list(job["headers"])
    texts = (ctypes.c_char_p * len(names))(*[job["headers"][name].encode() for name in names])
    files = (ctypes.c_char_p * len(names))(*[name.encode() for name in names])
    strings = ctypes.POINTER(ctypes.c_char_p)
    source, name = job["text"].encode(), job["name"].encode()
    status = rtc.call(
        "CreateProgram",
        *(ctypes.byref(program), source, name, len(names), texts, files),
        types=(
            *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p, ctypes.c_char_p),
            *(ctypes.c_int, strings, strings),
        ),
    )
    for expression in expressions if status == _OK else ():
        types: tuple[Any, ...] = (ctypes.c_void_p, ctypes.c_char_p)
        status = status or rtc.call("AddNameExpression", program, expression.encode(), types=types)
    if status == _OK:
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        types = (ctypes.c_void_p, ctypes.c_int, strings)
        status = rtc.call("CompileProgram", program, len(options), given, types=types)
        log = rtc.blob(program, "ProgramLog")
        result["log"] = log.rstrip(b"\0").decode(errors="replace")
    if status == _OK:
        symbols: dict[str, str] = {}
        for expression in expressions:
            found = ctypes.c_char_p()
            types = (ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p))
            pair = (expression.encode(), ctypes.byref(found))
            status = status or rtc.call("GetLoweredName", program, *pair, types=types)
            symbols[expression] = (found.value or b"").decode()
        result["symbols"] = symbols
        for form, kind in job["blobs"].items():
            data = rtc.blob(program, kind)
            # Freed only with the process: a library that fails at its end has answered by then.
            Path(f"code.{form}").write_bytes(data.rstrip(b"\0") if form == "ptx" else data)
    return {**result, "status": status}


def main() -> None:
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    try:
        result = _compile(job)
    except (OSError, AttributeError) as error:
        result = {"unusable": str(error)}
    Path("result.new").write_text(json.dumps(result), encoding="utf-8")
    Path("result.new").rename("result.json")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
