"""Step 1: memory. Nothing is here yet."""

from minichip_drivetrain.errors import unsupported


class Memory:
    def begin(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        raise unsupported("memory")

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        raise unsupported("alloc")

    def free(self, ptr: int, kind: int, stream: int) -> None:
        raise unsupported("free")

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        raise unsupported("copy")

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        raise unsupported("fill")
