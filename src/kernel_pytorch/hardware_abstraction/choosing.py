"""The guide's choice of a device: Drivetrain's placement policy, asked in the guide's words."""

from __future__ import annotations

from collections.abc import Sequence

from drivetrain.errors import BadInput, PlacementError
from drivetrain.placement import policy
from kernel_pytorch.hardware_abstraction.hal_core import GB, DeviceSpec, vendor_named

__all__ = ["ranked"]


def ranked(
    specs: Sequence[DeviceSpec],
    *,
    memory_gb: float = 0.0,
    compute_tflops: float = 0.0,
    prefer: Sequence[str] = (),
) -> list[DeviceSpec]:
    """The devices that fit, best first; empty when none does.

    A device fits that has ``memory_gb`` free (and the policy's headroom), and that no measurement
    and no peak keeps from ``compute_tflops``. Preferences come before scores; a vendor of which
    nothing fits is passed over.
    """
    for name, value in (("memory", memory_gb), ("compute", compute_tflops)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            raise BadInput(f"the {name} requirement {value!r} is no amount: give 0 or more")
    if isinstance(prefer, str):
        raise BadInput(f"preferred vendors are a list, as in [{prefer!r}]")
    wanted = tuple(str(vendor_named(name)) for name in prefer)
    by_address = {spec.address: spec for spec in specs if _reaches(spec, compute_tflops)}
    left = [_candidate(spec) for spec in by_address.values()]
    needed = int(memory_gb * GB)
    found: list[DeviceSpec] = []
    while left:
        try:
            decision = policy.place(
                policy.Workload("kernel_pytorch", memory_bytes=needed, prefer=wanted), left
            )
        except PlacementError:
            break
        found.append(by_address[decision.address])
        left = [each for each in left if each.address != decision.address]
    return found


def _reaches(spec: DeviceSpec, tflops: float) -> bool:
    return not tflops or spec.capabilities.may_reach(tflops)


def _candidate(spec: DeviceSpec) -> policy.Candidate:
    told = spec.capabilities
    features = {"compile"} if spec.torch_device else set()
    features |= {"bf16"} if "bfloat16" in told.precisions else set()
    features |= {"f16"} if "float16" in told.precisions else set()
    features |= {"matrix", "triton"} if told.supports_tensor_core else set()
    features |= {"graphs"} if "graphs" in spec.device.capabilities.groups else set()
    rates = dict(told.peak_tflops)
    if not rates and told.compute_tflops is not None:
        rates = {"float32": told.compute_tflops}
    # A processor's further runtimes are meant only when they are named themselves.
    vendor = spec.device.vendor if spec.device.info.by_name_only else str(spec.vendor)
    return policy.Candidate(
        address=spec.address,
        key=spec.device.uuid,
        driver=spec.device.driver,
        vendor=vendor,
        name=told.device_name,
        total_bytes=int(told.memory_gb * GB),
        free_bytes=int(told.available_memory_gb * GB),
        domain=spec.device.memory_domain,
        utilisation=told.utilisation,
        features=frozenset(features),
        peaks={name: rate * 1e12 for name, rate in rates.items()},
        by_name_only=spec.device.info.by_name_only,
    )
