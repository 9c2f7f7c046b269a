"""Networks of causal modules on live video: one frame of each stream at a time, with explicit state."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .classifier import VideoClassifier
from .injection import sites
from .modules.base import TemporalModule, is_causal
from .ops import autocast_dtype, positive_int
from .past import CHANGED, Step, blank_frame, check_evaluating, device_and_dtype, rehearse

State = dict[str, Tensor]
"""What a stream remembers: tensors whose dimension 0 is the stream, all zero before the first frame."""

Index = int | slice | Sequence[int] | Tensor


class StreamOutput(NamedTuple):
    """What :class:`Stream` gives for a frame of each stream, ``(B, classes)`` each."""

    logits: Tensor
    """Of the frame."""
    consensus: Tensor
    """Running consensus: the mean of the logits of the last ``window`` frames, or of all since the start.
    Not to be changed in place: it is part of the state."""


class Stream:
    """A causal network that takes videos frame by frame.

    At frame t it gives what the network gives for frame t of a clip that begins where the stream began, up to
    rounding: ``stream(f[0]), stream(f[1]), ...`` equals ``model(stack(f))`` of a model with
    ``n_segment = len(f)``. The cost of a step and its memory do not depend on t.

        stream = Stream(model)
        logits, consensus = stream(frames)  # (B, 3, H, W): one frame of each stream

    ``stream(frames)`` keeps the state itself, for one batch of streams. With the state in the caller's hands
    one process, with any number of threads, serves any number of them::

        state = stream.initial_state(4)
        logits, state = stream.step(frames, state)  # the consensus is state["consensus"]
        state = stream.reset(state, 2)  # the third stream starts anew

    A state is a flat dict of tensors: ``"frames"``, ``(B,)``, the frames seen; ``"consensus"``; ``"recent"``,
    the logits in the window, where there is one; and of each module what it needs of the past, as
    ``"<module>.<name>.<k>"``, k frames ago. Dimension 0 is the stream everywhere, and zeros are the start: a
    state can be saved (``torch.load`` with ``weights_only=True`` reads it), moved, indexed and concatenated
    key by key. No call changes a state it was given. Do not change its tensors in place: states share some.

    Args:
        model: a network whose temporal modules are causal (``inject(..., causal=True)``), or a
            :class:`~temporal_excite.VideoClassifier` around one, in eval mode. One without temporal modules
            (TSN) treats each frame by itself. The model is used, not copied: weights may change, modules not.
        window: frames of the running consensus; None: all since the start.

    Raises:
        TypeError: no module, one of TorchScript, or a compiled one: compile the step,
            ``stream.module.compile()``.
        ValueError: a temporal module is two-sided, or ``window`` is below 1.
        RuntimeError: the model is in training mode.
    """

    def __init__(self, model: nn.Module, window: int | None = None) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be a torch.nn.Module, not of TorchScript, got {type(model).__name__}"
            )
        if hasattr(model, "_orig_mod"):
            raise TypeError(
                "the model is compiled, and a compiled graph cannot run in steps: make the Stream from the "
                "plain model, then call stream.module.compile()"
            )
        if window is not None:
            positive_int("window", window)
        if isinstance(model, VideoClassifier):
            model = model.model
        _check_causal(model)
        check_evaluating(model)
        self.model = model
        """The network."""
        self.window = window
        self.module = StreamStep(model, window)
        """The step as an ``nn.Module``, ``(frames, state) -> (logits, state)``, without the checks: what to
        compile (``stream.module.compile()``, then use the stream as before) or export."""
        # found once: a search of all modules in each step, from cold caches, would show in the latency
        owned = ((m._parameters, name) for m in model.modules() for name in m._parameters)
        self._first = next(((own, name) for own, name in owned if own[name] is not None), None)
        self._modal = [m for m in model.modules() if isinstance(m, _NormBase) or "Drop" in type(m).__name__]
        self._plans: dict[tuple[object, ...], _Blanks] = {}
        self._own: State | None = None
        self._own_shape = torch.Size()

    def __call__(self, frames: Tensor) -> StreamOutput:
        """One frame of each stream; the first call sets the number of streams and the size of the frames.

        Raises what :meth:`step` raises; after :meth:`reset` the next call is a first one.
        """
        self._check_frames(frames)
        if self._own is None:
            state, self._own_shape = self.initial_state(len(frames), frames.shape[1:]), frames.shape
        elif frames.shape == self._own_shape:
            state = self._own
        else:
            raise ValueError(
                f"the streams began with frames {tuple(self._own_shape)}, got {tuple(frames.shape)}: reset() "
                "begins anew; to change the batch, use step() and index the state"
            )
        logits, self._own = self.step(frames, state)
        return StreamOutput(logits, self._own["consensus"])

    @torch.no_grad()
    def initial_state(self, batch: int, frame_shape: Sequence[int] | None = None) -> State:
        """The state of ``batch`` streams before their first frame: zeros, on the model's device.

        The first call for a size runs the network on one black frame to learn what it keeps. Call it under
        the autocast of the steps, if any: dtypes depend on it.

        Args:
            batch: B.
            frame_shape: ``(3, H, W)``; default: the input size in timm's configuration of the model.
        """
        positive_int("batch", batch)
        blanks = self._blanks(_frame_shape(self.model, frame_shape))
        return {key: blank.of(batch) for key, blank in blanks.items()}

    @torch.no_grad()
    def step(self, frames: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """One frame of each stream: its logits ``(B, classes)``, and the state after it.

        The running consensus is ``state["consensus"]`` of the new state. The given one stays as it is.

        Args:
            frames: ``(B, 3, H, W)``, on the model's device and in its dtype.
            state: of :meth:`initial_state` or the step before; rows may come from different states.

        Raises:
            ValueError: frames or a state of another shape, dtype, device or model.
            RuntimeError: the model, or a norm or dropout in it, is in training mode.
        """
        self._check_frames(frames)
        if self.model.training or any(m.training for m in self._modal):
            check_evaluating(self.model)
        self._check_state(frames, state)
        return self.module(frames, state)

    @overload
    def reset(self, state: None = None, index: Index | None = None) -> None: ...
    @overload
    def reset(self, state: Mapping[str, Tensor], index: Index | None = None) -> State: ...
    def reset(self, state: Mapping[str, Tensor] | None = None, index: Index | None = None) -> State | None:
        """Start streams anew: a new dict of ``state`` with their rows set to zero.

        Args:
            state: of :meth:`step`; None: the state that ``stream(frames)`` keeps.
            index: which streams, an index into dimension 0: a number, numbers, a slice, a mask; None: all.

        Raises:
            IndexError: no such stream.
        """
        if state is not None:
            if not isinstance(state, Mapping):
                raise TypeError(
                    f"a state is a dict of tensors, got {state!r}; of the own one, reset(index={state!r})"
                )
            return _reset(state, index)
        if self._own is not None:
            self._own = None if index is None else _reset(self._own, index)
        return None

    def state_bytes(self, frame_shape: Sequence[int] | None = None) -> int:
        """Bytes of one stream's state; :func:`~temporal_excite.sites` tells them site by site."""
        return sum(value.nbytes for value in self.initial_state(1, frame_shape).values())

    def _check_frames(self, frames: Tensor) -> None:
        if not isinstance(frames, Tensor) or frames.ndim != 4 or not len(frames):
            found = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(f"expected frames (B, 3, H, W), one of each stream, got {found}")
        device, dtype = self._kind()
        if frames.device != device:
            raise ValueError(f"frames are on {frames.device}, the model is on {device}: move one of them")
        if not frames.is_floating_point() or (frames.dtype != dtype and not autocast_dtype(device.type)):
            raise ValueError(f"frames are {frames.dtype}, the model {dtype}: convert (and normalise) them")

    def _check_state(self, frames: Tensor, state: Mapping[str, Tensor]) -> None:
        if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
            raise TypeError(f"a state is a dict of tensors, see initial_state(), got {type(state).__name__}")
        blanks, batch = self._blanks(tuple(frames.shape[1:])), len(frames)
        if state.keys() != blanks.keys():
            raise ValueError(
                f"not a state of this model and window; missing: {_some(blanks.keys() - state.keys())}; "
                f"unknown: {_some(state.keys() - blanks.keys())}; begin with initial_state({batch})"
            )
        for key, (shape, dtype, device) in blanks.kinds(batch).items():
            value = state[key]
            if value.shape != shape:
                raise ValueError(
                    f"frames {tuple(frames.shape)} need state[{key!r}] of shape {tuple(shape)}, got "
                    f"{tuple(value.shape)}: batch and frame size stay what the streams began with; begin "
                    f"others with initial_state({batch}, {tuple(frames.shape[1:])})"
                )
            if value.dtype != dtype or value.device != device:
                raise ValueError(
                    f"state[{key!r}] is {value.dtype} on {value.device}, and needs to be {dtype} on "
                    f"{device}: move the state with the model and keep autocast as it was, or begin anew by "
                    "initial_state(), or by reset() of a stream's own"
                )

    def _kind(self) -> tuple[torch.device, torch.dtype]:
        """:func:`~.past.device_and_dtype` the model."""
        like = self._first and self._first[0].get(self._first[1])
        return device_and_dtype(self.model) if like is None else (like.device, like.dtype)

    def _blanks(self, frame_shape: tuple[int, ...]) -> "_Blanks":
        device, dtype = self._kind()
        key = (frame_shape, device, dtype, autocast_dtype(device.type))
        if key not in self._plans:
            self._plans[key] = _plan(self.module, blank_frame(self.model, frame_shape))
        return self._plans[key]


class StreamStep(nn.Module):
    """What :class:`Stream` runs, ``(frames, state) -> (logits, state)``, without its checks. Made by it."""

    def __init__(self, model: nn.Module, window: int | None) -> None:
        super().__init__()
        self.model = model
        self.window = window
        self.names: dict[nn.Module, str] = {
            m: name for name, m in model.named_modules() if isinstance(m, TemporalModule)
        }
        self.copied: frozenset[str] | None = None
        """Keys of tensors to copy: the network changes them later in the step."""
        self.eval()

    def forward(self, frames: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        if self.copied is None:
            raise RuntimeError("call the stream's initial_state() once before using its module")
        with Step(self.names, state, self.copied) as step:
            logits = self.model(frames)
        new = {**self._consensus(logits, state), **step.left}
        if new.keys() != state.keys():
            raise RuntimeError(CHANGED)
        return logits, {key: new[key] for key in state}  # modules may run in another order

    def _consensus(self, logits: Tensor, state: Mapping[str, Tensor]) -> State:
        seen = state["frames"] + 1
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        count = seen.view(-1, *[1] * (logits.ndim - 1)).to(wide.dtype)
        if self.window is None:
            before = state["consensus"]
            return {"frames": seen, "consensus": before + (wide - before) / count}
        recent = torch.cat([state["recent"][:, 1:], wide.unsqueeze(1)], dim=1)
        consensus = recent.sum(1) / count.clamp(max=self.window)
        return {"frames": seen, "consensus": consensus, "recent": recent}


@dataclass(frozen=True)
class _Blank:
    """An initial tensor of one stream."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @classmethod
    def like(cls, value: Tensor) -> "_Blank":
        last = not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
        return cls(value.shape[1:], value.dtype, value.device, last)

    def of(self, batch: int) -> Tensor:
        zeros = torch.zeros((batch, *self.shape), dtype=self.dtype, device=self.device)
        return zeros.contiguous(memory_format=torch.channels_last) if self.channels_last else zeros


class _Blanks(dict[str, _Blank]):
    """The initial state of one stream."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__((key, _Blank.like(value)) for key, value in state.items())
        self._kinds: dict[int, dict[str, tuple[torch.Size, torch.dtype, torch.device]]] = {}

    def kinds(self, batch: int) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
        """Shape, dtype and device of the state of ``batch`` streams."""
        if batch not in self._kinds:
            self._kinds[batch] = {
                key: (torch.Size((batch, *blank.shape)), blank.dtype, blank.device)
                for key, blank in self.items()
            }
        return self._kinds[batch]


def _plan(module: StreamStep, frame: Tensor) -> _Blanks:
    """The state of one stream of such frames, ``(1, C, H, W)``."""
    step, logits = rehearse(module.model, frame)
    if not isinstance(logits, Tensor) or logits.shape[:1] != (1,):
        raise TypeError(
            f"the model must give one tensor with a row a frame, such as logits (B, classes), got "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}"
        )
    state = {"frames": step.state["frames"]}
    state["consensus"] = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if module.window is not None:
        state["recent"] = torch.stack([state["consensus"]] * module.window, dim=1)
    module.copied = (module.copied or frozenset()) | step.changed(frame)
    return _Blanks(state | step.left)


def _check_causal(model: nn.Module) -> None:
    for site in sites(model):
        if not is_causal(site.module):
            raise ValueError(
                f"{site.kind} at {site.layer} is two-sided: eject(model), inject(model, ..., causal=True); a "
                "module of your own that treats each frame by itself says so by an attribute causal = True"
            )
    for name, module in model.named_modules():
        if isinstance(module, TemporalModule) and not module.causal:
            raise ValueError(f"{type(module).__name__} {name!r} is two-sided: build it with causal=True")


def _frame_shape(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        given = (getattr(model, "default_cfg", None) or {}).get("input_size")
        if given is None:
            raise ValueError(
                f"{type(model).__name__} has no default_cfg that tells a frame's size: pass frame_shape"
            )
    return tuple(given)


def _reset(state: Mapping[str, Tensor], index: Index | None) -> State:
    if isinstance(index, bool | str):
        raise TypeError(f"index must be a number, numbers, a slice or a mask, got {index!r}")
    gone = torch.zeros(len(state["frames"]), dtype=torch.bool, device=state["frames"].device)
    # a tuple would be an index into several dimensions
    gone[slice(None) if index is None else list(index) if isinstance(index, tuple) else index] = True
    return {key: value.masked_fill(gone.view(-1, *[1] * (value.ndim - 1)), 0) for key, value in state.items()}


def _some(keys: Set[str]) -> str:
    """A few keys for a message."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(sorted(keys)[:3]) + more or "nothing"
