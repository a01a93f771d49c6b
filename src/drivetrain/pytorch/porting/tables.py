"""What is one vendor's, and the form of it that is everybody's."""

from __future__ import annotations

from collections.abc import Mapping

DEVICE = (
    "drivetrain.device_for_this_job(); without Drivetrain torch.accelerator.current_accelerator() "
    "or 'cpu'"
)

DEVICE_TYPES: Mapping[str, str] = {
    "cuda": "NVIDIA (and AMD under ROCm)",
    "hip": "AMD",
    "xpu": "Intel",
    "mps": "Apple",
    "npu": "Ascend",
    "mlu": "Cambricon",
    "hpu": "Gaudi",
    "xla": "TPU",
}

MODULES: Mapping[str, str] = {
    "torch.cuda": "cuda",
    "torch.xpu": "xpu",
    "torch.mps": "mps",
    "torch.npu": "npu",
    "torch.mlu": "mlu",
    "torch.hpu": "hpu",
}
"""Modules of torch for one kind of device -> that kind."""

CALLS: Mapping[str, str] = {
    "is_available": "torch.accelerator.is_available()",
    "device_count": "torch.accelerator.device_count()",
    "current_device": "torch.accelerator.current_device_index()",
    "set_device": "torch.accelerator.set_device_index(index)",
    "device": "torch.accelerator.device_index(index)",
    "synchronize": "torch.accelerator.synchronize()",
    "empty_cache": "torch.accelerator.empty_cache()",
    "memory_allocated": "torch.accelerator.memory_allocated()",
    "max_memory_allocated": "torch.accelerator.max_memory_allocated()",
    "memory_reserved": "torch.accelerator.memory_reserved()",
    "max_memory_reserved": "torch.accelerator.max_memory_reserved()",
    "memory_stats": "torch.accelerator.memory_stats()",
    "reset_peak_memory_stats": "torch.accelerator.reset_peak_memory_stats()",
    "reset_max_memory_allocated": "torch.accelerator.reset_peak_memory_stats()",
    "mem_get_info": "torch.accelerator.get_memory_info()",
    "current_stream": "torch.accelerator.current_stream()",
    "set_stream": "torch.accelerator.set_stream(stream)",
    "stream": "with stream: (torch.Stream is a context manager)",
    "Stream": "torch.Stream(device)",
    "Event": "torch.Event(device, enable_timing=True)",
    "manual_seed": "torch.manual_seed(seed), which seeds every device",
    "manual_seed_all": "torch.manual_seed(seed), which seeds every device",
    "amp.autocast": "torch.autocast(device.type, dtype=...)",
    "amp.GradScaler": "torch.amp.GradScaler(device.type)",
    "get_device_name": "drivetrain.hal.device(address).name",
    "get_device_properties": "drivetrain.hal.device(address).capabilities",
    "utilization": "drivetrain.hal.device(address).telemetry().utilisation",
    "temperature": "drivetrain.hal.device(address).telemetry().temperature_c",
    "power_draw": "drivetrain.hal.device(address).telemetry().power_w",
    "CUDAGraph": "torch.accelerator.Graph where the device has graphs, else the plain call",
    "graph": "torch.accelerator.Graph where the device has graphs, else the plain call",
    "nvtx.range_push": "torch.profiler.record_function(name)",
    "nvtx.range_pop": "torch.profiler.record_function(name)",
    "nvtx.range": "torch.profiler.record_function(name)",
    "OutOfMemoryError": "torch.OutOfMemoryError",
    "get_rng_state": "torch.get_device_module(device).get_rng_state()",
    "set_rng_state": "torch.get_device_module(device).set_rng_state(state)",
}
"""Functions of such a module -> the portable one."""

OTHER_CALL = "torch.get_device_module(device), asked with hasattr for what not every device has"
CAPABILITY = (
    "ask for what is needed, not for a model: torch.accelerator.get_device_capability(), or "
    "drivetrain.hal.device(address).capabilities"
)

_SDPA = "torch.nn.functional.scaled_dot_product_attention, which has a kernel on each device"
_AO = "torchao"
_TELEMETRY = "drivetrain.hal.device(address).telemetry(), which knows every vendor"
KERNELS = (
    "@drivetrain.kernel, an op with an implementation for each kind of device; or "
    "drivetrain.hal.Source.cuda(text), one CUDA C source for all of them"
)
_NATIVE = "torch's own device, torch.xpu; Intel Extension for PyTorch is discontinued"

IMPORTS: Mapping[str, tuple[str, str]] = {
    "aiter": ("AMD", _SDPA),
    "amdsmi": ("AMD", _TELEMETRY),
    "apex": ("NVIDIA", "torch.amp, torch.optim with fused=True, torch.nn.LayerNorm"),
    "bitsandbytes": ("NVIDIA", _AO),
    "cuda": ("NVIDIA", "drivetrain.hal"),
    "cudf": ("NVIDIA", "pandas or polars; DLPack for the tensors"),
    "cuml": ("NVIDIA", "scikit-learn"),
    "cupy": ("NVIDIA (and AMD)", "torch, or drivetrain.hal.Array"),
    "flash_attn": ("NVIDIA (and AMD)", _SDPA),
    "flashinfer": ("NVIDIA", _SDPA),
    "habana_frameworks": ("Gaudi", "torch.accelerator; torch_hpu registers itself"),
    "intel_extension_for_pytorch": ("Intel", _NATIVE),
    "ipex_llm": ("Intel", _NATIVE),
    "numba.cuda": ("NVIDIA", KERNELS),
    "nvidia.dali": ("NVIDIA", "torch.utils.data.DataLoader, torchvision.transforms.v2"),
    "nvidia_smi": ("NVIDIA", _TELEMETRY),
    "nvtx": ("NVIDIA", "torch.profiler.record_function(name)"),
    "oneccl_bindings_for_pytorch": ("Intel", "the backend xccl, which torch has itself"),
    "pycuda": ("NVIDIA", "drivetrain.hal"),
    "pyhip": ("AMD", "drivetrain.hal"),
    "pynvml": ("NVIDIA", _TELEMETRY),
    "pyrsmi": ("AMD", _TELEMETRY),
    "tensorrt": ("NVIDIA", "torch.compile, torch.export"),
    "tensorrt_llm": ("NVIDIA", "torch.compile, torch.export"),
    "torch2trt": ("NVIDIA", "torch.compile, torch.export"),
    "torch_directml": ("DirectML", "torch.accelerator"),
    "torch_mlu": ("Cambricon", "torch.accelerator; torch_mlu registers itself"),
    "torch_npu": ("Ascend", "torch.accelerator; torch_npu registers itself"),
    "torch_tensorrt": ("NVIDIA", "torch.compile, torch.export"),
    "torch_xla": ("TPU", "torch.accelerator"),
    "transformer_engine": ("NVIDIA", f"{_AO} (float8), and torch's own layers"),
    "xformers": ("NVIDIA (and AMD)", _SDPA),
}
"""Packages for one vendor -> whose, and what does the same everywhere."""

ENVIRONMENT: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "NVIDIA",
    "CUDA_DEVICE_ORDER": "NVIDIA",
    "HIP_VISIBLE_DEVICES": "AMD",
    "ROCR_VISIBLE_DEVICES": "AMD",
    "GPU_DEVICE_ORDINAL": "AMD",
    "ZE_AFFINITY_MASK": "Intel",
    "ONEAPI_DEVICE_SELECTOR": "Intel",
    "ASCEND_RT_VISIBLE_DEVICES": "Ascend",
    "MLU_VISIBLE_DEVICES": "Cambricon",
    "HABANA_VISIBLE_DEVICES": "Gaudi",
}
"""Variables that pick devices."""

TUNING = ("CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "RCCL_", "MIOPEN_", "HSA_", "TORCH_CUDA_", "XPU_")
TUNING_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "TORCH_NCCL_BLOCKING_WAIT")

TOOLS: Mapping[str, str] = {
    "nvidia-smi": "NVIDIA",
    "nvcc": "NVIDIA",
    "rocm-smi": "AMD",
    "amd-smi": "AMD",
    "rocminfo": "AMD",
    "hipcc": "AMD",
    "xpu-smi": "Intel",
    "npu-smi": "Ascend",
}

COLLECTIVES: Mapping[str, str] = {
    "nccl": "NVIDIA (and AMD under ROCm)",
    "rccl": "AMD",
    "xccl": "Intel",
    "ccl": "Intel",
    "hccl": "Ascend",
    "cncl": "Cambricon",
}
BACKEND = "torch.distributed.get_default_backend_for_device(device)"

SWITCHES: Mapping[str, tuple[str, str, str]] = {
    "torch.backends.cuda.matmul.allow_tf32": (
        "tf32-switch",
        "NVIDIA",
        "torch.set_float32_matmul_precision('high')",
    ),
    "torch.backends.cudnn.allow_tf32": (
        "tf32-switch",
        "NVIDIA",
        "torch.set_float32_matmul_precision('high')",
    ),
    "torch.backends.cuda.matmul.fp32_precision": (
        "tf32-switch",
        "NVIDIA",
        "torch.backends.fp32_precision, which every device reads as far as it can",
    ),
    "torch.backends.cudnn.conv.fp32_precision": (
        "tf32-switch",
        "NVIDIA",
        "torch.backends.fp32_precision, which every device reads as far as it can",
    ),
    "torch.backends.cuda.matmul": ("cuda-switch", "NVIDIA", "`drivetrain optimize`"),
    "torch.backends.cudnn": (
        "cuda-switch",
        "NVIDIA",
        "nothing: it has no effect elsewhere; torch.use_deterministic_algorithms(True) for "
        "determinism",
    ),
    "torch.backends.cuda": (
        "cuda-switch",
        "NVIDIA",
        "torch.nn.attention.sdpa_kernel([...]) for attention, else nothing",
    ),
}
"""Switches, the most particular first -> code, whose, and the portable form."""

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
FLOAT8_FORM = (
    "let `drivetrain optimize` try it, which keeps it where the device is faster with it and the "
    "error is small; e4m3fn is NVIDIA's, e4m3fnuz that of AMD's MI300"
)
