"""Step 2: streams and events. Nothing is here yet."""

from minichip_drivetrain.errors import unsupported


class Streams:
    def begin(self) -> None: ...

    def close(self) -> None: ...

    def synchronize(self, timeout_s: float) -> bool:
        raise unsupported("synchronize")

    def stream_create(self, priority: int) -> int:
        raise unsupported("stream_create")

    def stream_destroy(self, stream: int) -> None:
        raise unsupported("stream_destroy")

    def stream_done(self, stream: int) -> bool:
        raise unsupported("stream_done")

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        raise unsupported("stream_synchronize")

    def stream_wait(self, stream: int, event: int) -> None:
        raise unsupported("stream_wait")

    def event_create(self, timing: bool) -> int:
        raise unsupported("event_create")

    def event_destroy(self, event: int) -> None:
        raise unsupported("event_destroy")

    def event_record(self, event: int, stream: int) -> None:
        raise unsupported("event_record")

    def event_done(self, event: int) -> bool:
        raise unsupported("event_done")

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        raise unsupported("event_synchronize")

    def event_seconds(self, start: int, end: int) -> float:
        raise unsupported("event_seconds")
