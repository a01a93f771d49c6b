"""Step 3: kernels. Nothing is here yet."""

from minichip_drivetrain.errors import unsupported


class Kernels:
    def begin(self) -> None: ...

    def module_load(self, code: bytes, form: str) -> int:
        raise unsupported("module_load")

    def module_unload(self, module: int) -> None:
        raise unsupported("module_unload")

    def function(self, module: int, symbol: str) -> int:
        raise unsupported("function")

    def function_arguments(self, function: int, sizes: list[int]) -> None:
        raise unsupported("function_arguments")

    def function_facts(self, function: int):
        raise unsupported("function_facts")

    def launch(self, function, grid, block, shared, stream, arguments, sizes) -> None:
        raise unsupported("launch")
