"""One operation, several implementations: the right one runs on each device, and all agree."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import drivetrain
from drivetrain import hal
from drivetrain.errors import BadInput, CompileError
from drivetrain.pytorch.kernel import Op

SAXPY = """
extern "C" __global__ void saxpy(float a, const float *x, const float *y, float *out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a * x[i] + y[i];
}
"""
ADDRESS = """
extern "C" __global__ void address(const float *x, long long *out) { out[0] = (long long)x; }
"""
ran: list[str] = []


@drivetrain.kernel("drivetrain_test::saxpy")
def saxpy(a: float, x: Tensor, y: Tensor) -> Tensor:
    ran.append("torch")
    return a * x + y


@saxpy.cuda(SAXPY, "saxpy", when=lambda a, x, y: x.is_contiguous() or "x is not contiguous")
def _(launch: Any, a: float, x: Tensor, y: Tensor) -> Tensor:
    ran.append("cuda")
    out = torch.empty_like(x)
    launch((x.numel() + 255) // 256, 256, a, x, y.contiguous(), out, x.numel())
    return out


def planted(a: float, x: Tensor, y: Tensor) -> Tensor:
    return a * x - y


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return x, y


def test_on_the_processor_the_cuda_c_runs_through_the_hal() -> None:
    x, y = operands(33, 7)
    ran.clear()
    found = saxpy(2.0, x, y)
    assert ran == ["cuda"]
    assert torch.equal(found, 2 * x + y)
    assert not torch.equal(found, planted(2.0, x, y))  # so that the comparison can fail


def test_the_kernel_sees_the_tensors_own_memory() -> None:
    @drivetrain.kernel("drivetrain_test::address")
    def address(x: Tensor) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)

    @address.cuda(ADDRESS, "address")
    def _(launch: Any, x: Tensor) -> Tensor:
        out = torch.empty(1, dtype=torch.int64)
        launch(1, 1, x, out)
        return out

    whole = torch.zeros(64)
    assert address(whole).item() == whole.data_ptr()
    assert address(whole[5:]).item() == whole.data_ptr() + 20


def test_what_the_first_does_not_take_goes_to_the_next_with_its_reason() -> None:
    x, y = operands(4, 6)
    half = saxpy.misfits(2.0, x.half(), y.half())
    assert half == {"saxpy": "it is for float32, not float16", "torch": ""}
    assert saxpy.misfits(2.0, x.t(), y.t())["saxpy"] == "x is not contiguous"
    ran.clear()
    assert torch.equal(saxpy(2.0, x.half(), y.half()), 2 * x.half() + y.half())
    assert torch.equal(saxpy(2.0, x.t(), y.t()), 2 * x.t() + y.t())
    assert ran == ["torch", "torch"]
    assert saxpy.choose(2.0, x, y).name == "saxpy"


def test_torchs_own_checks_of_a_custom_operation_pass() -> None:
    x, y = operands(5, 3)
    samples = [
        (2.0, x, y),
        (2.0, x.clone().requires_grad_(), y),
        (2.0, x.clone().requires_grad_(), y.clone().requires_grad_()),
        (0.5, x.double().requires_grad_(), y.double()),
        (1.0, x[:0], y[:0]),
    ]
    for sample in samples:
        results = torch.library.opcheck(saxpy.op, sample)
        assert set(results.values()) == {"SUCCESS"}, results


def test_gradients_are_those_of_the_function_unless_told_otherwise() -> None:
    x, y = (each.double().requires_grad_() for each in operands(6))
    assert torch.autograd.gradcheck(lambda x, y: saxpy(2.0, x, y), (x, y))
    x, y = (each.requires_grad_() for each in operands(6))
    saxpy(2.0, x, y).square().sum().backward()
    slope = 2 * (2 * x + y).detach()
    torch.testing.assert_close(x.grad, 2 * slope)
    torch.testing.assert_close(y.grad, slope)


def test_gradients_of_ones_own_are_used() -> None:
    @drivetrain.kernel("drivetrain_test::twice")
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.autograd(lambda ctx, slope: slope * 7)
    x = torch.ones(3, requires_grad=True)
    twice(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [7, 7, 7]


def test_a_fake_of_ones_own_is_used_where_the_function_reads_values() -> None:
    @drivetrain.kernel("drivetrain_test::total")
    def total(x: Tensor) -> Tensor:
        return torch.tensor([float(sum(x.tolist()))])

    total.fake(lambda x: x.new_empty(1))
    x = torch.ones(4)
    compiled = torch.compile(lambda x: total(x) + 1, backend="aot_eager", fullgraph=True)
    assert compiled(x).item() == 5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_the_same_implementation_runs_under_torch_compile_forward_and_backward(
    backend: str,
) -> None:
    x, y = operands(64)
    x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: saxpy(3.0, x, y).sin().sum(), backend=backend, fullgraph=True
    )
    ran.clear()
    compiled(x, y).backward()
    assert "cuda" in ran
    torch.testing.assert_close(x.grad, (3 * torch.cos(3 * x + y)).detach())


def test_an_operation_that_changes_its_argument_says_so_and_does() -> None:
    @drivetrain.kernel("drivetrain_test::scale_", mutates=["x"])
    def scale_(x: Tensor, by: float) -> None:
        x.mul_(by)

    @scale_.cuda(
        'extern "C" __global__ void scale(float *x, float by, int n) {'
        " int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] *= by; }",
        "scale",
        args=[hal.PTR, hal.F32, hal.I32],
    )
    def _(launch: Any, x: Tensor, by: float) -> None:
        launch((x.numel() + 63) // 64, 64, x, by, x.numel())

    x = torch.ones(100)
    scale_(x, 3.0)
    assert x.tolist() == [3.0] * 100
    with pytest.raises(BadInput, match="has no gradients"):
        scale_.autograd(lambda ctx: None)


def test_triton_is_asked_before_torch_and_passed_over_where_it_cannot_run() -> None:
    @drivetrain.kernel("drivetrain_test::with_triton")
    def op(x: Tensor) -> Tensor:
        return x + 1

    @op.triton()
    def _(x: Tensor) -> Tensor:
        raise AssertionError("this is no GPU")

    @op.torch(name="in-place", devices=["cpu"])
    def _(x: Tensor) -> Tensor:
        return x.clone().add_(1)

    x = torch.ones(2)
    assert op.misfits(x)["triton"] == "it is for cuda and xpu, not cpu"
    assert op.choose(x).name == "in-place"
    assert [each.name for each in op.implementations] == ["triton", "in-place", "torch"]
    assert op(x).tolist() == [2, 2]


def test_a_source_that_is_wrong_is_an_error_and_not_passed_over() -> None:
    @drivetrain.kernel("drivetrain_test::wrong_source")
    def op(x: Tensor) -> Tensor:
        return x + 1

    op.cuda('extern "C" __global__ void k(float *x) { x[0] = nothing; }', "k")(lambda launch, x: x)
    with pytest.raises(CompileError):
        op(torch.ones(1))


def untyped(x):  # type: ignore[no-untyped-def]
    return x


def no_result(x: Tensor):  # type: ignore[no-untyped-def]
    return x


def several(*x: Tensor) -> Tensor:
    return x[0]


def of_a_dict(x: dict) -> Tensor:  # type: ignore[type-arg]
    return torch.ones(1)


def right(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize(
    ("name", "function", "says"),
    [
        ("saxpy", right, "library::name"),
        ("a b::c", right, "library::name"),
        ("drivetrain_test::saxpy", right, "exists already"),
        ("drivetrain_test::untyped", untyped, "x has no type"),
        ("drivetrain_test::no_result", no_result, "what it returns"),
        ("drivetrain_test::several", several, "plain parameter"),
        ("drivetrain_test::of_a_dict", of_a_dict, "of_a_dict"),
        ("drivetrain_test::none", 3, "decorates a function"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(name: str, function: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        drivetrain.kernel(name)(function)


def test_bad_launches_are_refused_before_anything_runs() -> None:
    @drivetrain.kernel("drivetrain_test::launches")
    def op(x: Tensor, how: int) -> Tensor:
        return x + 1

    @op.cuda(SAXPY, "saxpy")
    def _(launch: Any, x: Tensor, how: int) -> Tensor:
        out = torch.empty_like(x)
        n = x.numel()
        given: tuple[Any, ...] = (
            (1.0, x.t(), x, out, n),
            (1.0, x, x, out),
            (1.0, x, x, out, 1 << 40),
            (1.0, x, torch.empty(4, device="meta"), out, n),
        )[how]
        launch(1, 32, *given)
        return out

    for how, says in enumerate(["not contiguous", "takes 5 arguments", "does not lie", "on meta"]):
        with pytest.raises(BadInput, match=says):
            op(torch.ones(4, 3), how)
    with pytest.raises(BadInput, match="an implementation 'saxpy' already"):
        op.cuda(SAXPY, "saxpy")(lambda launch, x, how: x)
    with pytest.raises(BadInput, match="is no source"):
        op.cuda(3, "saxpy")  # type: ignore[arg-type]
    assert isinstance(op, Op)


def test_on_a_hal_device_as_torch_device_the_cuda_c_runs_there() -> None:
    if not any(each.driver == "opencl" for each in hal.devices("opencl")):
        pytest.skip("needs an OpenCL device: apt install pocl-opencl-icd")
    code = """
    import torch
    import drivetrain
    from torch import Tensor
    from drivetrain.pytorch.custom import register_custom_device

    device = register_custom_device("opencl:0").device

    @drivetrain.kernel("there::saxpy")
    def saxpy(a: float, x: Tensor, y: Tensor) -> Tensor:
        return a * x + y

    @saxpy.cuda('''SOURCE''', "saxpy")
    def _(launch, a, x, y):
        assert launch.kernel.device.address == "opencl:0"
        out = torch.empty_like(x)
        launch((x.numel() + 255) // 256, 256, a, x, y, out, x.numel())
        return out

    x, y = torch.randn(1000), torch.randn(1000)
    far = [t.to(device) for t in (x, y)]
    assert saxpy.choose(2.0, *far).name == "saxpy"
    torch.testing.assert_close(saxpy(2.0, *far).cpu(), 2 * x + y)
    torch.testing.assert_close(saxpy(2.0, far[0][9:], far[1][9:]).cpu(), (2 * x + y)[9:])
    assert saxpy(2.0, far[0][:0], far[1][:0]).shape == (0,)
    far[0].requires_grad_()
    saxpy(2.0, *far).sum().backward()
    assert far[0].grad.cpu().tolist() == [2.0] * 1000
    try:
        saxpy(2.0, far[0], y)
    except Exception as error:
        assert "move them to one device" in str(error), error
    else:
        raise AssertionError("tensors of two devices were taken")
    print("right")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code).replace("SOURCE", SAXPY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "right", done.stderr[-3000:]
