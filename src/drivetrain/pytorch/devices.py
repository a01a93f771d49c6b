"""The same device by both names: HAL's and torch's. Memory and streams are shared, never copied.

torch has devices of its own for NVIDIA and AMD (``cuda``), Intel (``xpu``), Apple (``mps``) and the
processor; whatever else there is takes its one place for custom devices: what
`drivetrain.pytorch.custom` registered, or a package such as torch_npu, which is adopted as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drivetrain import hal
from drivetrain.errors import BadInput, Unsupported
from drivetrain.pytorch.custom.config import NOT_RENAMED, Config
from drivetrain.pytorch.custom.hal_backend import HalBackend, buffer_of, stream_of
from drivetrain.pytorch.custom.registration import register_custom_device, registered

_ON_XPU = ("level_zero", "sycl")
_IN_TREE = ("cpu", "cuda", "xpu", "mps")


def torch_device(device: hal.Device | torch.device | str) -> torch.device:
    """torch's name of a device, which is given as a HAL device, its address or torch's own name.

    Every processor of the HAL (``cpu:1``) is torch's ``cpu``. Raises BadInput for a text that names
    no device, and Unsupported, with what to do, where this torch has none for it: its build serves
    one vendor, and other devices must be registered first (`use` does).
    """
    if isinstance(device, str):
        device = _named(device)
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cpu" else device
    if not isinstance(device, hal.Device):
        raise BadInput(
            f"{type(device).__name__} is no device; give an address such as 'cuda:0', a "
            "hal.Device or a torch.device"
        )
    found = device
    backend = _hal_backend()
    if backend is not None and found in backend.devices:
        handle = registered()
        assert handle is not None
        return torch.device(handle.name, backend.devices.index(found))
    if found.driver == "cpu":
        return torch.device("cpu")
    if found.driver in ("cuda", "hip") and bool(torch.version.hip) == (found.driver == "hip"):
        for index in range(torch.cuda.device_count()):
            if _same_gpu(torch.cuda.get_device_properties(index), found):
                return torch.device("cuda", index)
    if found.driver in _ON_XPU and hasattr(torch, "xpu"):
        for index in range(torch.xpu.device_count()):
            if _same_gpu(torch.xpu.get_device_properties(index), found):
                return torch.device("xpu", index)
    raise Unsupported(
        f"torch {torch.__version__} has no device for {found.address}; install its build for "
        f"{found.vendor}, or register_custom_device({found.address!r})",
        code="unsupported",
        driver=found.driver,
        op="torch_device",
        device=found.address,
    )


def use(device: hal.Device | str, config: Config | None = None) -> torch.device:
    """torch's device of a HAL device, which is registered where torch has none for it: then it is
    this process's custom device, until the process ends. Raises BadInput where torch's place for
    such devices is taken by another."""
    try:
        return torch_device(device)
    except Unsupported:
        return register_custom_device(device, config).device


def _named(text: str) -> hal.Device | torch.device:
    """What an address or a name of torch's (``cuda``) names."""
    try:
        return hal.device(text or "cpu:0")
    except BadInput:
        try:
            found = torch.device(text)
        except RuntimeError:
            found = None
        own = {*_IN_TREE, torch._C._get_privateuse1_backend_name()} - {NOT_RENAMED}
        if found is not None and found.type in own:
            return found
        raise


def hal_device(device: torch.device | str) -> hal.Device:
    """The HAL device behind a torch device. Raises BadInput when there is none."""
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return hal.device("cpu:0")
    handle, backend = registered(), _hal_backend()
    if handle is not None and wanted.type == handle.name:
        index = torch.get_device_module(handle.name).current_device()
        index = index if wanted.index is None else wanted.index
        if backend is None:
            raise BadInput(f"{wanted} is a registered backend, not a device of the HAL")
        if index >= len(backend.devices):
            raise BadInput(f"there is no {wanted}; the last is index {len(backend.devices) - 1}")
        return backend.devices[index]
    drivers = {"cuda": ("hip" if torch.version.hip else "cuda",), "xpu": _ON_XPU}
    for driver in drivers.get(wanted.type, ()):
        if driver in hal.drivers() and hal.drivers()[driver].state == "usable":
            module = torch.get_device_module(wanted.type)
            index = module.current_device() if wanted.index is None else wanted.index
            for each in hal.devices(driver):
                if _same_gpu(module.get_device_properties(index), each):
                    return each
    raise BadInput(f"no device of the HAL is torch's {wanted}; see `drivetrain devices`")


def accelerator() -> torch.device | None:
    """What ``torch.accelerator`` calls the current one, with its index; None without one."""
    found = torch.accelerator.current_accelerator()
    if found is None or not torch.accelerator.is_available():
        return None
    return torch.device(found.type, torch.accelerator.current_device_index())


def adopted() -> str:
    """The device type that another package (torch_npu, torch_mlu, ...) put into torch's place for
    custom devices; empty when it is free or Drivetrain's. It is used through `accelerator` and
    ``torch.NAME`` as it is."""
    name = torch._C._get_privateuse1_backend_name()
    handle = registered()
    ours = handle is not None and handle.name == name
    return "" if ours or name == NOT_RENAMED else str(name)


def as_buffer(tensor: Tensor) -> hal.Buffer:
    """The tensor's memory as a HAL buffer that keeps the tensor alive; nothing is copied.

    The tensor must be contiguous; queue work on `as_stream` of its device. Raises BadInput.
    """
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise BadInput("as_buffer: the tensor has gaps or another order; make it contiguous()")
    nbytes = tensor.numel() * tensor.element_size()
    handle = registered()
    if handle is not None and tensor.device.type == handle.name:
        if _hal_backend() is None:
            raise BadInput(f"{tensor.device} is no device of the HAL")
        if not nbytes:
            raise BadInput("as_buffer: an empty tensor has no memory")
        whole = buffer_of(tensor)
        return whole.device.wrap(whole.ptr, nbytes, owner=(tensor, whole), kind=whole.kind)
    device = hal_device(tensor.device)
    return device.wrap(tensor.data_ptr(), nbytes, owner=tensor)


def as_tensor(buffer: hal.Buffer, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A buffer of the processor or a GPU of torch's as a flat tensor; nothing is copied, and the
    tensor keeps the buffer alive. Raises BadInput for devices that torch cannot take memory of."""
    if torch_device(buffer.device).type not in ("cpu", "cuda", "xpu"):
        raise BadInput(
            f"torch takes memory of {buffer.device.address} only from its own tensors; make one "
            "with torch.empty and look at it with as_buffer"
        )
    flat: Tensor = torch.utils.dlpack.from_dlpack(buffer)
    return flat.view(dtype)


def as_stream(device: torch.device | str) -> hal.Stream:
    """torch's current stream of a device as a HAL stream: what is queued on it comes after torch's
    work and before what torch queues next. Raises BadInput for the processor, which has none."""
    wanted = torch.device(device)
    handle = registered()
    if handle is not None and wanted.type == handle.name and _hal_backend() is not None:
        return stream_of(torch.empty(0, device=wanted))
    if wanted.type not in ("cuda", "xpu"):
        raise BadInput(f"{wanted} works without streams; what torch did is done")
    current: Any = torch.get_device_module(wanted.type).current_stream(wanted)
    handles = (getattr(current, f"{kind}_stream", None) for kind in ("cuda", "sycl"))
    pointer = next((each for each in handles if each is not None), 0)
    # CUDA's default stream has the handle 0 in torch and the name 1 in the driver.
    return hal_device(wanted).wrap_stream(int(pointer) or 1, owner=current)


def _hal_backend() -> HalBackend | None:
    handle = registered()
    if handle is None or not isinstance(handle.backends[0], HalBackend):
        return None
    return handle.backends[0]


def _same_gpu(properties: Any, device: hal.Device) -> bool:
    """By uuid, else by PCI address."""
    theirs = str(getattr(properties, "uuid", "")).lower().removeprefix("gpu-")
    ours = device.uuid.lower().removeprefix("gpu-")
    if theirs and theirs == ours:
        return True
    bus = getattr(properties, "pci_bus_id", None)
    if bus is None or not device.info.pci:
        return False
    domain = getattr(properties, "pci_domain_id", 0)
    place = f"{domain:04x}:{bus:02x}:{getattr(properties, 'pci_device_id', 0):02x}"
    return device.info.pci.lower().endswith(f"{place}.0")
