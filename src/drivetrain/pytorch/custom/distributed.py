"""Collectives for the device: a Python process group.

``init_process_group("NAME_ccl")`` (`group_name`). Where the backend has
``collectives(store, rank, world_size, timeout_s)``, what that returns does the work:
``all_reduce(tensors, op)``, ``broadcast(tensors, root)``, ``all_gather(outputs, inputs)``,
``reduce_scatter(outputs, inputs, op)`` and ``barrier()``, on lists of tensors of the device, done
when they return. Without it, the bytes go through the host and gloo.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from drivetrain.pytorch.custom.runtime import Runtime

_made: Any = None


def group_name(name: str) -> str:
    """The name of the collectives of a device type."""
    return f"{name}_ccl"


def register(runtime: Runtime) -> None:
    """Tell torch.distributed, where this torch has it."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    backend: Any = dist.Backend
    backend.register_backend(
        group_name(runtime.name),
        lambda store, rank, size, timeout: _group(runtime, store, rank, size, timeout),
        devices=[runtime.name, "cpu"],
    )


def _group(runtime: Runtime, store: Any, rank: int, size: int, timeout: Any) -> Any:
    import torch.distributed as dist

    own = None
    give = getattr(runtime.backends[0], "collectives", None)
    if give is not None:
        own = give(store, rank, size, timeout.total_seconds())
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
    kind: Any = _kind()
    return kind(runtime, rank, size, gloo, own)


def _kind() -> Any:
    """The class, made when it is first asked for: torch.distributed may be absent."""
    global _made
    if _made is not None:
        return _made
    import torch.distributed as dist
    from torch._C._distributed_c10d import Work

    base: Any = dist.ProcessGroup

    class Done(Work):
        """Work that is done."""

        def __init__(self, result: Any) -> None:
            super().__init__()
            self.future: Any = torch.futures.Future()
            self.future.set_result(result)

        def wait(self, timeout: Any = None) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

        def get_future(self) -> Any:
            return self.future

    class Group(base):  # type: ignore[misc]
        """Tensors of the device by the backend's collectives, or by gloo on the host."""

        def __init__(self, runtime: Runtime, rank: int, size: int, gloo: Any, own: Any) -> None:
            super().__init__(rank, size)
            self.runtime, self.gloo, self.own, self.count = runtime, gloo, own, size

        def getBackendName(self) -> str:
            return group_name(self.runtime.name)

        def size(self) -> int:
            return self.count

        @property
        def pg_name(self) -> str:
            return str(sys.modules["torch.distributed.distributed_c10d"]._world.pg_names[self])

        @property
        def group_name(self) -> str:
            return self.pg_name

        def _ours(self, tensors: Any) -> bool:
            flat = [t for t in tensors for t in (t if isinstance(t, (list, tuple)) else (t,))]
            return self.own is not None and all(map(self.runtime.is_here, flat))

        def _on_host(self, tensors: Any) -> list[Tensor]:
            for each in tensors:
                if self.runtime.is_here(each):
                    self.runtime.synchronize(each.device.index)
            return [t.cpu() if self.runtime.is_here(t) else t for t in tensors]

        def _back(self, tensors: Any, hosts: Any) -> Done:
            for one, host in zip(tensors, hosts, strict=True):
                if one is not host:
                    one.copy_(host)
            return Done(list(tensors))

        def allreduce(self, tensors: Any, opts: Any = None) -> Any:
            opts = dist.AllreduceOptions() if opts is None else opts
            if self._ours(tensors):
                self.own.all_reduce(tensors, opts.reduceOp)
                return Done(tensors)
            hosts = self._on_host(tensors)
            self.gloo.allreduce(hosts, opts).wait()
            return self._back(tensors, hosts)

        def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
            for each in tensors:
                one = dist.AllreduceOptions()
                if opts is not None:
                    one.reduceOp = opts.reduceOp
                self.allreduce([each], one)
            return Done(tensors)

        def broadcast(self, tensors: Any, opts: Any = None) -> Any:
            opts = dist.BroadcastOptions() if opts is None else opts
            if self._ours(tensors):
                self.own.broadcast(tensors, opts.rootRank)
                return Done(tensors)
            hosts = self._on_host(tensors)
            self.gloo.broadcast(hosts, opts).wait()
            return self._back(tensors, hosts)

        def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            if self._ours((*outputs, *inputs)):
                self.own.all_gather(outputs, inputs)
                return Done(outputs)
            hosts = [
                [torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in o] for o in outputs
            ]
            self.gloo.allgather(hosts, [t.contiguous() for t in self._on_host(inputs)]).wait()
            for part, its in zip(outputs, hosts, strict=True):
                self._back(part, its)
            return Done(outputs)

        def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
            parts = list(output.view(self.count, -1).unbind(0))
            return self.allgather([parts], [given.reshape(-1)])

        def allgather_into_tensor_coalesced(
            self, outputs: Any, inputs: Any, opts: Any = None
        ) -> Any:
            for output, given in zip(outputs, inputs, strict=True):
                self._allgather_base(output, given, opts)
            return Done(outputs)

        # Their names from torch 2.13 on.
        all_gather_single = _allgather_base
        all_gather_single_coalesced = allgather_into_tensor_coalesced

        def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            operation: Any = dist.ReduceOp.SUM if opts is None else opts.reduceOp
            if self._ours((*outputs, *inputs)):
                self.own.reduce_scatter(outputs, inputs, operation)
                return Done(outputs)
            for output, parts in zip(outputs, inputs, strict=True):
                hosts = [each.clone() for each in self._on_host(parts)]
                each_opts = dist.AllreduceOptions()
                each_opts.reduceOp = operation
                for host in hosts:
                    self.gloo.allreduce([host], each_opts).wait()
                output.copy_(hosts[self.rank()])
            return Done(outputs)

        def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
            parts = list(given.reshape(self.count, -1).unbind(0))
            return self.reduce_scatter([output.view(-1)], [parts], opts)

        def reduce_scatter_tensor_coalesced(
            self, outputs: Any, inputs: Any, opts: Any = None
        ) -> Any:
            for output, given in zip(outputs, inputs, strict=True):
                self._reduce_scatter_base(output, given, opts)
            return Done(outputs)

        reduce_scatter_single = _reduce_scatter_base
        reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

        def barrier(self, opts: Any = None) -> Any:
            if self.own is not None:
                self.own.barrier()
            else:
                self.gloo.barrier().wait()
            return Done([])

    _made = Group
    return _made
