"""AMD GPUs, found in the files of the amdgpu kernel driver (KFD). Only the probe, in a process of
its own, and `open_device` start HIP; so does listing with a library that
``DRIVETRAIN_HIP_LIBRARY`` names, which may show other devices than the kernel has."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal.driver import (
    Backend,
    Capabilities,
    DeviceInfo,
    Driver,
    Isolation,
    hidden_from_all,
)
from drivetrain.hal.drivers import hip_api
from drivetrain.hal.drivers.cuda_visible import Gpu, visible
from drivetrain.hal.drivers.memory_probe import fill_and_read
from drivetrain.hal.telemetry import Telemetry

# --- names ---------------------------------------------------------------------------------------

NAME = "hip"
VENDOR = "amd"
GROUPS = frozenset({"compute", "graphs", "managed", "peer", "pinned", "timing"})
VISIBLE_TOO = "CUDA_VISIBLE_DEVICES"
"""HIP reads it where its own variable is not set."""
NODES = "sys/class/kfd/kfd/topology/nodes"
ROOT = Path("/")


# --- discovery -----------------------------------------------------------------------------------


def _on_the_bus(root: Path) -> bool:
    """An AMD display controller or accelerator that no driver needs to be loaded for to be seen."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == "0x1002" and kind.startswith(("0x03", "0x12")):
            return True
    return False


def absent(root: Path = ROOT) -> str:
    """Why there is no AMD GPU to be used here; ``""`` when listing is worth a child."""
    selected = os.environ.get(hip_api.SELECTED, "")
    if selected:
        missing = f"{hip_api.SELECTED}={selected} names no file"
        return "" if hip_api.paths(root) else missing
    kernel = (root / "dev/kfd").exists()
    if kernel and (root / NODES).is_dir():
        return ""
    if _on_the_bus(root):
        return "an AMD GPU is on the PCI bus, but its kernel driver (amdgpu) is not loaded"
    if kernel:
        return f"/dev/kfd is here, but /{NODES} is not: the driver's files are hidden"
    if hip_api.paths(root):
        return "libamdhip64 is installed, but there is no AMD GPU (no /dev/kfd)"
    return "no AMD GPU (no /dev/kfd) and no ROCm (no libamdhip64)"


@dataclass(frozen=True)
class Node:
    """A GPU as the kernel driver describes it."""

    facts: dict[str, int]
    memory_bytes: int
    root: Path

    @property
    def name(self) -> str:
        return _text(self._card / "product_name") or f"AMD GPU ({self.arch})"

    @property
    def numa_node(self) -> int | None:
        """The kernel's word for where the GPU hangs; -1 is its word for unknown."""
        text = _text(self._card / "numa_node")
        return int(text) if text.isdigit() else None

    @property
    def _card(self) -> Path:
        return self.root / "sys/bus/pci/devices" / self.pci

    @property
    def arch(self) -> str:
        """``gfx90a`` of 90010: two decimal digits each, the last two written as hexadecimal."""
        number = self.facts.get("gfx_target_version", 0)
        return f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}" if number else ""

    @property
    def pci(self) -> str:
        """``0000:c1:00.0``"""
        at = self.facts.get("location_id", 0)
        domain = self.facts.get("domain", 0)
        return f"{domain:04x}:{at >> 8 & 0xFF:02x}:{at >> 3 & 0x1F:02x}.{at & 7}"

    @property
    def uuid(self) -> str:
        """What ``rocminfo`` calls it; its place where the card has no number of its own."""
        number = self.facts.get("unique_id", 0)
        return f"GPU-{number:016x}" if number else f"PCI-{self.pci}"


def nodes(root: Path = ROOT) -> list[Node]:
    """The GPUs of the kernel driver in its order, which is ROCm's. Those that this process may not
    use (a container's device rules) cannot be read, and are left out."""
    found = []
    folders = [path for path in (root / NODES).glob("*") if path.name.isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name)):
        facts = _facts(folder / "properties")
        if not facts.get("simd_count") or not facts.get("gfx_target_version"):
            continue  # a processor
        banks = (_facts(path) for path in folder.glob("mem_banks/*/properties"))
        memory = sum(b.get("size_in_bytes", 0) for b in banks if b.get("heap_type") in (1, 2))
        found.append(Node(facts, memory, root))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _facts(path: Path) -> dict[str, int]:
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}


def left(gpus: list[str]) -> list[str]:
    """What the variables of ROCm leave of the GPUs, in their order. HIP's counts in what ROCr's
    leaves; CUDA's stands in for HIP's where that is not set."""
    names = ["ROCR_VISIBLE_DEVICES"]
    names.append("HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else VISIBLE_TOO)
    for name in names:
        if os.environ.get(name):
            gpus = visible(os.environ[name], [Gpu(uuid) for uuid in gpus])
    return gpus


def discover(root: Path = ROOT) -> tuple[DeviceInfo, ...]:
    if os.environ.get(hip_api.SELECTED):
        return _through_the_library()
    every = {node.uuid: node for node in nodes(root)}
    if not every:
        raise DriverMissing("the AMD kernel driver has no GPU", code="no_device", driver=NAME)
    chosen = left(list(every))
    if not chosen:
        raise DriverMissing(
            f"ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES or {VISIBLE_TOO} hides every one of the "
            f"{len(every)} AMD GPUs",
            code="no_device",
            driver=NAME,
        )
    if not hip_api.paths(root):
        raise HalError(
            "the AMD kernel driver is loaded, but there is no libamdhip64: install ROCm",
            code="broken",
            driver=NAME,
        )
    version = _text(root / "sys/module/amdgpu/version") or _text(root / "proc/sys/kernel/osrelease")
    order = list(every)
    return tuple(
        _described(index, every[uuid], order.index(uuid), f"amdgpu {version}", len(chosen))
        for index, uuid in enumerate(chosen)
    )


def _described(index: int, node: Node, place: int, version: str, count: int) -> DeviceInfo:
    facts = node.facts
    simds, per = facts.get("simd_count", 0), facts.get("simd_per_cu", 0)
    return DeviceInfo(
        driver=NAME,
        index=index,
        name=node.name,
        vendor=VENDOR,
        uuid=node.uuid,
        pci=node.pci,
        memory_bytes=node.memory_bytes,
        driver_version=version,
        numa_node=node.numa_node,
        capabilities=Capabilities(
            compute=node.arch,
            multiprocessors=simds // per if per else None,
            features=(f"wave{facts['wave_front_size']}",) if "wave_front_size" in facts else (),
            clock_mhz=facts.get("max_engine_clk_fcompute"),
            groups=tuple(sorted(GROUPS)),
        ),
        isolation=isolation(node.uuid if node.uuid.startswith("GPU-") else str(place), count),
        telemetry=_first_reading(node.memory_bytes),
    )


def _through_the_library() -> tuple[DeviceInfo, ...]:
    """What the library that was selected shows. Its devices have PCI addresses only where the
    machine has them too."""
    from drivetrain.hal.drivers.hip_api import Hip
    from drivetrain.hal.drivers.hip_backend import initialised, seen

    api = initialised(hip_api.load())

    def number(attribute: int, device: int) -> int:
        box = ctypes.c_int()
        code = api.cuDeviceGetAttribute(ctypes.byref(box), attribute, device)
        return 0 if code else box.value

    found = []
    devices = seen(api)
    for device, (uuid, pci) in enumerate(devices):
        name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
        api.cuDeviceGetName(name, len(name), device)
        api.cuDeviceTotalMem(ctypes.byref(total), device)
        features = [f"wave{number(Hip.DeviceAttributeWarpSize, device)}"]
        if api.is_fake:
            features.append("fake")
        here = (ROOT / "sys/bus/pci/devices" / pci).exists()
        found.append(
            DeviceInfo(
                driver=NAME,
                index=device,
                name=name.value.decode(errors="replace") or "HIP device",
                vendor=VENDOR,
                uuid=uuid or f"PCI-{pci}",
                pci=pci if here else "",
                memory_bytes=total.value,
                driver_version=f"HIP {api.version_text()}",
                capabilities=Capabilities(
                    compute=api.architecture(device),
                    multiprocessors=number(Hip.DeviceAttributeMultiprocessorCount, device) or None,
                    features=tuple(features),
                    clock_mhz=number(Hip.DeviceAttributeClockRate, device) // 1000 or None,
                    memory_clock_mhz=number(Hip.DeviceAttributeMemoryClockRate, device) // 1000
                    or None,
                    groups=tuple(sorted(GROUPS - api.off)),
                ),
                isolation=isolation(uuid or str(device), len(devices)),
                telemetry=_first_reading(total.value),
            )
        )
    return tuple(found)


def _first_reading(total: int) -> Telemetry:
    return Telemetry(memory_total_bytes=total or None, at=time.time())


# --- telemetry -----------------------------------------------------------------------------------


def telemetry(info: DeviceInfo) -> Telemetry:
    """The sensors of the card at its PCI address; only the size of memory where it has none."""
    if info.fault:
        return Telemetry(health=f"lost: {info.fault}")
    if not info.pci:
        return _first_reading(info.memory_bytes)
    from drivetrain.hal.telemetry import amd

    return amd.read(info.pci)


# --- isolation -----------------------------------------------------------------------------------


def isolation(name: str, count: int) -> Isolation:
    """Only this GPU, by uuid or by its place; it is ``cuda:0`` in a worker's torch for ROCm."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // max(count, 1))
    environment = hidden_from_all(
        ROCR_VISIBLE_DEVICES=name,
        HIP_VISIBLE_DEVICES="0",
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
    )
    return Isolation(environment, None, threads, "cuda:0")


# --- probe ---------------------------------------------------------------------------------------


def probe(info: DeviceInfo) -> None:
    """1 MiB allocated, filled, copied back and compared. Raises HalError."""
    fill_and_read(open_device(info), info)


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """The device, open in this process through ``libamdhip64``. Raises HalError."""
    from drivetrain.hal.drivers.hip_backend import HipBackend

    return HipBackend(info)


DRIVER = Driver(
    name=NAME,
    vendor=VENDOR,
    absent=absent,
    discover=discover,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    groups=GROUPS,
    install=(
        "install the amdgpu kernel driver and ROCm 5.7 or newer (https://rocm.docs.amd.com), and "
        "be in the groups render and video; in a container, start it with --device /dev/kfd "
        "--device /dev/dri"
    ),
)
