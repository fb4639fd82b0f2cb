"""A pretended GPU: it counts on the CPU, but each tensor has a device, and mixing them is an error as on CUDA.

    with pretend_cuda() as gpu:
        train(Args(device="cuda"))
    gpu.waits, gpu.draws  # where the host waited for the device, what random numbers were drawn there

To PyTorch's C++ code a `Gpu` is on `meta`, the one other device that every build knows. `Host` translates
between cuda, which the program says, and meta; `Device` runs each operation on what is wrapped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
CROSSES = ("aten::_to_copy", "aten::copy_")  # the operations that may have tensors of both devices
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal")


class Gpu(Tensor):
    """A tensor on the pretended device; its numbers are in `.inside`, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> "Gpu":
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "dtype": inside.dtype}
        self = Tensor._make_wrapper_subclass(cls, inside.shape, device=META, **layout)
        self.inside = inside
        return self

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.inside.__reduce_ex__(protocol)  # a checkpoint holds plain tensors

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended GPU outside of pretend_cuda()")


def is_mixed(args: list) -> bool:
    """Whether tensors of both devices are among them; a single number may be on the CPU, but not in a list."""
    lists = [x for arg in args if isinstance(arg, list | tuple) for x in tree_leaves(arg)]
    tensors = [x for x in lists if isinstance(x, Tensor)]
    tensors += [x for x in args if isinstance(x, Gpu) or (isinstance(x, Tensor) and x.dim() > 0)]
    return len({isinstance(x, Gpu) for x in tensors}) == 2


class Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits, self.draws, self.graphs, self.tape = [], [], [], None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        gpus = [x for x in inputs if isinstance(x, Gpu)]
        if name not in CROSSES and is_mixed([*args, *kwargs.values()]):
            raise RuntimeError(f"{func} of {[(x.shape, type(x).__name__) for x in inputs]}")
        on_gpu = isinstance(args[0], Gpu) if name == "aten::copy_" else bool(gpus)
        if kwargs.get("device") is not None:
            on_gpu, kwargs["device"] = kwargs["device"] == META, CPU
        mask = name.startswith("aten::index") and any(x.dtype == torch.bool for x in gpus[1:])  # hides a nonzero()
        if gpus and (name in WAITS or (name in CROSSES and not on_gpu) or mask):
            self.waits.append(name)
        if on_gpu and torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append(name)
        if self.tape is not None and name in CROSSES and len(gpus) < 1 + (name == "aten::copy_"):
            raise RuntimeError(f"{func} between host and GPU, in a graph")
        args, kwargs = tree_map_only(Gpu, lambda x: x.inside, (args, kwargs))
        if self.tape is not None and func._schema.is_mutable:
            self.before += [(x, x.clone()) for x in tree_leaves(args) if isinstance(x, Tensor)]
        output = func(*args, **kwargs)
        if self.tape is not None and on_gpu:
            self.tape.append((func, args, kwargs, output))
        known = {id(x.inside): x for x in gpus}  # in-place operations give back what they got
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Gpu(x), output) if on_gpu else output


class Host(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Gpu):
            if func == Tensor.device.__get__:
                return CUDA
            if func == Tensor.is_cuda.__get__:
                return True
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("a CUDA tensor cannot be a numpy array: it needs .cpu() first")
            if func == Tensor.tolist:
                return args[0].cpu().tolist()
            if func == Tensor.data.__set__:
                args[0].inside = args[1].inside

        def translate(x: Any) -> Any:
            return META if isinstance(x, torch.device | str) and str(x).split(":")[0] == "cuda" else x

        args, kwargs = tree_map(translate, (args, kwargs or {}))
        return func(*args, **kwargs)


class Graph:
    """For torch.cuda.CUDAGraph: the operations that were run on the pretended GPU while it was recorded."""

    def __init__(self) -> None:
        self.tape: list = []

    def replay(self) -> None:
        for func, args, kwargs, output in self.tape:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


@contextmanager
def pretend_cuda() -> Iterator[Device]:
    optimizer = torch.optim.Optimizer  # which would ask a driver, in a build for CUDA
    checks = {name: lambda self: None for name in vars(optimizer) if name.endswith("capture_health_check")}
    one_gpu = mock.patch.object(torch.cuda, "device_count", return_value=1)

    @contextmanager
    def record(graph: Graph) -> Iterator[None]:
        device.graphs.append(graph)
        device.tape, device.before = graph.tape, []
        yield
        device.tape = None
        for x, was in reversed(device.before):  # recording changes nothing
            x.copy_(was)

    graphs = mock.patch.multiple(torch.cuda, CUDAGraph=Graph, graph=record, set_device=lambda _: None)
    with one_gpu, graphs, mock.patch.multiple(optimizer, **checks), Device() as device, Host():
        yield device
