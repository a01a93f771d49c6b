"""What ``CUDA_VISIBLE_DEVICES`` leaves of a machine's GPUs, read as CUDA reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML counts it. With MIG on, only its instances can compute."""

    uuid: str
    mig: tuple[str, ...] = ()
    mig_on: bool = False


def visible(value: str | None, gpus: Sequence[Gpu]) -> list[str]:
    """The uuids that ``CUDA_VISIBLE_DEVICES=value`` leaves, in its order, as CUDA reads it.

    ``None`` (unset) leaves all. Entries are indices, ``GPU-`` and ``MIG-`` uuids or unique prefixes
    of them; reading stops at the first entry that names nothing (``-1``, an ambiguous prefix); a
    repeated entry leaves no device at all. Indices count in PCI order, which is CUDA's own order on
    machines whose GPUs are alike (else set ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, or name uuids).
    An entry that names a GPU with MIG on means its first instance.
    """
    if value is None:
        return [u for gpu in gpus for u in (gpu.mig if gpu.mig_on else (gpu.uuid,))]
    chosen: list[str] = []
    for entry in value.split(","):
        uuid = _named(entry.strip(), gpus)
        if uuid is None:
            break
        if uuid in chosen:
            return []
        chosen.append(uuid)
    return chosen


def _named(entry: str, gpus: Sequence[Gpu]) -> str | None:
    def computing(gpu: Gpu) -> str | None:
        if gpu.mig_on:
            return gpu.mig[0] if gpu.mig else None
        return gpu.uuid

    index = re.match(r"\+?(\d+)", entry)
    if index is not None:
        number = int(index.group(1))
        return computing(gpus[number]) if number < len(gpus) else None
    if entry.startswith("MIG-"):
        found = [uuid for gpu in gpus for uuid in gpu.mig if uuid.startswith(entry)]
        return found[0] if len(found) == 1 else None
    if entry.startswith("GPU-"):
        named = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
        return computing(named[0]) if len(named) == 1 else None
    return None
