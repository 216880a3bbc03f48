"""A device that is none: its tensors hold real numbers in the host's memory, say that they lie elsewhere, are counted.

    with PretendedDevice() as device:
        shard = Shard(replace(spec, device="pretend"))
    device.waits, device.uploaded, device.launches

What an accelerator refuses is refused here: two devices in one operation, a tensor handed to numpy. What makes a host
wait for an accelerator is counted by where it was asked for: a number read, indices of unknown length, a copy to the
host. Copies are counted by the memory on the host's side, ordinary (pageable) or page-locked, and by whether the host
waits for them; those that it does not wait for come late (see pretended_streams). It is torch's own Python back end
under the name that torch keeps for devices it does not know (PrivateUse1); nothing is compiled. Operations run on the
CPU's kernels, so results agree with the CPU's to the bit wherever the code takes the same way on both.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pretended_streams
import torch
from pretended_streams import Streams, check_order
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from espalier.stages.storage.staging import lane_of

NAME = "pretend"
aten = torch.ops.aten
# The host cannot go on before the device has answered: it is given a number, or a tensor as long as the answer says.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
# Views whose bit, on a tensor of numbers inside, operations on the wrapper would not heed: computed at once.
AT_ONCE = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
COPYING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class _InThisThread:
    """An executor that does at once what it is given."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


class MixedDevices(RuntimeError):
    """An operation was given tensors of two devices."""


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: object) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: object) -> None:
        pass

    def synchronize(self, *_: object) -> None:
        pass

    Stream, Event = pretended_streams.Stream, pretended_streams.Event
    stream = staticmethod(pretended_streams.stream)

    def current_stream(self, *_: object) -> pretended_streams.Stream:
        return pretended_streams.current().current


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)


class _Far(torch.Tensor):
    """A tensor on the device; `numbers` holds them, in the host's memory."""

    numbers: Tensor
    made_on: pretended_streams.Stream | None  # None: outside of any PretendedDevice
    launch: int  # which of all launches made it, or wrote to it last
    recorded: set[pretended_streams.Stream]

    @staticmethod
    def __new__(cls, real: Tensor) -> "_Far":
        far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        far.numbers, far.recorded = real, set()
        far.made_on = None if Streams.now is None else Streams.now.current
        far.launch = 0 if Streams.now is None else Streams.now.launches()
        return far

    def __init__(self, real: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        _note_wait("tolist")
        return self.numbers.tolist()

    def record_stream(self, stream: Any) -> None:
        self.recorded.add(stream)

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert a tensor of the pretended device to numpy; use .cpu() first")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Far({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """Within it the device exists, and what is asked of it is counted."""

    current: "PretendedDevice | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.uploaded = self.downloaded = 0  # bytes
        self.waits: Counter[str] = Counter()  # what for and where -> how often
        self.copies: Counter[str] = Counter()  # which memory, which way, waited for or not, where -> how often
        self.streams = Streams(lambda: self.launches, _note_wait)
        self._held = ExitStack()

    def __enter__(self) -> "PretendedDevice":
        PretendedDevice.current, Streams.now = self, self.streams
        lane_of.cache_clear()
        self._held.callback(lane_of.cache_clear)
        for name in ("tensor", "as_tensor"):  # they make a tensor of numbers without asking any mode
            self._held.enter_context(patch.object(torch, name, _made_elsewhere(getattr(torch, name))))
        self._held.enter_context(patch.object(torch, "empty", _page_locked(torch.empty)))  # in other threads too
        # a mode holds in the thread that entered it: what is read ahead is read at once
        self._held.enter_context(patch("espalier.stages.shard.block_cache.ThreadPoolExecutor", _InThisThread))
        # torch would put new numbers under an old parameter, whose wrapper would not hear of it
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._held.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        PretendedDevice.current = Streams.now = None
        self._held.close()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What it waits for within the block alone."""
        before, found = self.waits.copy(), Counter[str]()
        yield found
        found.update(self.waits - before)

    @contextmanager
    def copying(self) -> Iterator[Counter[str]]:
        """What it copies within the block alone."""
        before, found = self.copies.copy(), Counter[str]()
        yield found
        found.update(self.copies - before)


def _made_elsewhere(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return make(data, **options) if device is None else make(data, **options).to(device)

    return made


def _page_locked(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return pretended_streams.current().lock(empty(*size, **options)) if pin_memory else empty(*size, **options)

    return made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the tensors' real numbers; its results lie where its operands do."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, _Far)]
    wanted = kwargs.get("device")
    asked_for = wanted is not None and torch.device(wanted).type == NAME
    if not far and not asked_for:
        return func(*args, **kwargs)
    func = AT_ONCE.get(func, func)
    _refuse_mixture(func, args, tensors)
    real_args, real_kwargs = tree_map_only(_Far, lambda tensor: tensor.numbers, (args, kwargs))
    if wanted is not None:
        real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
    real_kwargs.pop("pin_memory", None)
    there = isinstance(args[0], _Far) if func is aten.copy_.default else asked_for if wanted is not None else True
    late = _count(func, args, kwargs, there)
    for tensor in far if Streams.now is not None else ():
        if tensor.made_on is not None:
            check_order(func, tensor.made_on, tensor.launch, tensor.recorded)
    if late:
        out = _copied_late(func, real_args, real_kwargs, there)
    elif func is aten.histc.default and not real_args[0].is_floating_point():  # accelerators have it for integers too
        real_args = (real_args[0].float(), *real_args[1:])
        out = func(*real_args, **real_kwargs).to(args[0].dtype)
    else:
        out = func(*real_args, **real_kwargs)
    written = {id(tensor.numbers): tensor for tensor in _written(func, args, kwargs) if isinstance(tensor, _Far)}
    if Streams.now is not None and Streams.now.current is Streams.now.computing:
        for tensor in written.values():
            tensor.launch = Streams.now.launches()
    return tree_map_only(Tensor, lambda t: written.get(id(t), _Far(t) if there else t), out)


def _refuse_mixture(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises MixedDevices where an accelerator would: it takes a lone number of the host's in what works number by
    number, and indices."""
    near = [tensor for tensor in tensors if not isinstance(tensor, _Far)]
    if not near or len(near) == len(tensors) or func in COPYING:
        return
    if func in INDEXING:
        values = args[2] if len(args) > 2 else None
        near = [tensor for tensor in near if tensor is args[0] or tensor is values]
    bad = [tensor for tensor in near if tensor.dim() or torch.Tag.pointwise not in func.tags]
    if bad:
        raise MixedDevices(f"{func} at {_place()}: {[(tuple(t.shape), str(t.device)) for t in tensors]}")


def _count(func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> bool:
    """Counts what the operation costs; whether it is a copy that the host does not wait for."""
    device = PretendedDevice.current
    if device is None:
        return False
    device.launches += 1
    if func in WAITING:
        _note_wait(str(func).removeprefix("aten."))
    if func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
        _note_wait("index by bool")
    if func is aten._foreach_copy_.default:
        for target, source in zip(args[0], args[1], strict=True):
            _count(aten.copy_.default, (target, source), {}, isinstance(target, _Far))
    elif func in COPYING:
        return _count_copy(device, func, args, kwargs, there)
    return False


def _count_copy(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> bool:
    source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], None)
    if isinstance(source, _Far) == there:
        return False
    asked = kwargs.get("non_blocking", len(args) > 2 and func is aten.copy_.default and args[2])
    # torch gives a copy to the host that is not to be waited for, where it makes the target, page-locked memory
    locked = asked if not there and target is None else device.streams.is_locked(source if there else target)
    late = bool(locked and asked)
    memory = "page-locked" if locked else "pageable"
    device.copies[f"{memory} {'up' if there else 'down'}{'' if late else ', waited for'} at {_place()}"] += 1
    if there:
        device.uploaded += source.nbytes
    else:
        device.downloaded += source.numbers.nbytes
        if not late:
            _note_wait("copy to host")
    return late


def _copied_late(func: Any, real_args: Any, real_kwargs: dict[str, Any], up: bool) -> Tensor:
    """The target of a copy that comes when somebody has waited for it."""
    if func is aten.copy_.default:
        target, source = real_args[:2]
    else:
        source = real_args[0]
        target = func(source, **{**real_kwargs, "non_blocking": False})
        target = target.clone() if target is source else target
    pretended_streams.current().copy_late(target, source, up)
    return target


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The operands that the operation changes in place: what comes back is they themselves."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[position] if position < len(args) else kwargs.get(argument.name))


def _note_wait(what: str) -> None:
    if PretendedDevice.current is not None:
        PretendedDevice.current.waits[f"{what} at {_place()}"] += 1


def _place() -> str:
    """Which function of ours asked; of what stages/storage/staging.py does, for whom."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tests/" not in name and ("/stages/" in name or "/cluster/" in name) and not name.endswith("/staging.py"):
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
