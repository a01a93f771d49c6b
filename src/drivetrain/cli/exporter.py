"""``drivetrain exporter``: metrics for Prometheus."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from drivetrain.errors import BadInput

PORT = 9834


def exporter(
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="Listen here; by default on loopback only."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any that is free.")] = PORT,
    textfile: Annotated[
        Path | None,
        typer.Option(
            "--textfile",
            metavar="FILE.prom",
            help="Write the metrics here instead, for the node exporter's textfile collector.",
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option("--every", metavar="S", help="With --textfile: again each S seconds."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Show Prometheus the devices, jobs, moves, failovers and leases of this machine.

    Without options it listens on http://127.0.0.1:9834/metrics until Ctrl-C or SIGTERM.

    Examples:

      drivetrain exporter

      drivetrain exporter --textfile /var/lib/node_exporter/drivetrain.prom --every 15

      drivetrain exporter --once
    """
    from drivetrain.runtime.metrics import Collector
    from drivetrain.runtime.metrics_server import MetricsServer, is_loopback, write_textfile

    if every is not None and (textfile is None or not 1 <= every <= 3600):
        raise BadInput("--every goes with --textfile and takes 1 to 3600 seconds")
    if not 0 <= port <= 65535:
        raise BadInput(f"--port {port}: give a port from 0 to 65535")
    if once and textfile is not None:
        raise BadInput("--once prints; --textfile without --every writes once")
    collector = Collector()
    if once:
        print(collector.page(), end="")
        return
    with _told_to_end() as told:
        if textfile is not None:
            write_textfile(textfile, collector.page())
            while every is not None and not select.select([told], [], [], every)[0]:
                write_textfile(textfile, collector.page())
            return
        with MetricsServer(host, port, collector.page) as server:
            where = f"[{host}]" if ":" in host else host
            print(
                f"drivetrain: metrics at http://{where}:{server.port}/metrics",
                file=sys.stderr,
                flush=True,
            )
            if not is_loopback(host):
                print(
                    "drivetrain: whoever reaches this address can read the names of jobs, scripts "
                    "and devices; there is no password",
                    file=sys.stderr,
                    flush=True,
                )
            threading.Thread(target=server.serve_forever, name="exporter", daemon=True).start()
            select.select([told], [], [])
            server.shutdown()


@contextmanager
def _told_to_end() -> Iterator[int]:
    """A file that can be read once Ctrl-C or SIGTERM has come. An exception out of a handler can be
    lost: raised where a weak reference ends, it is printed and forgotten."""
    told = os.eventfd(0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: os.eventfd_write(told, 1))
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(told)
