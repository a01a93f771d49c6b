"""The fake hiprtc's compiler: CUDA C to the cpu driver's shared object, with the table behind it
from which the fake reads the bytes of each kernel's arguments.

    fake_compiler.py SOURCE OUT LOG [-DNAME=VALUE ...]

The log is the compiler's, or for code that compiled one line for each kernel: its name in the
source, and its symbol.
"""

import sys
from pathlib import Path

from drivetrain.errors import DrivetrainError
from drivetrain.hal.driver import Target
from drivetrain.hal.language.compiling import compile
from drivetrain.hal.language.source import Source


def main(source: str, out: str, log: str, *options: str) -> int:
    defined = [option for option in options if not option.startswith("-D__DRIVETRAIN__")]
    try:
        made = compile(Source.cuda(Path(source).read_text()), Target("cpu"), options=defined)
    except DrivetrainError as error:
        Path(log).write_text(getattr(error, "log", "") or str(error))
        return 1
    lines = [
        " ".join([facts.symbol, *(str(p.nbytes) for p in facts.params or ())])
        for facts in made.kernels.values()
    ]
    Path(out).write_bytes(made.code + b"DTFAKE" + "\n".join(lines).encode() + b"\0")
    names = "".join(f"{name} {facts.symbol}\n" for name, facts in made.kernels.items())
    Path(log).write_text("\n" + names)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
