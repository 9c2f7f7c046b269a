"""Maps of clips. Every function leaves the network as it was: hooks, modes of its layers, gradients."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from ..classifier import VideoClassifier
from ..injection import sites
from ..modules.action import CE, ME, STE, ActionModule
from ..modules.tefe import TEModule
from ..ops import full_precision, to_clips

Target = int | Sequence[int] | Tensor | None


def cam(video_model: VideoClassifier, clip: Tensor, target: Target = None) -> Tensor:
    """Class activation maps: ``M[t] = sum_c W[target, c] F[t, c]``, F the last features, W the classifier.

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, Eq. 2, for each frame of a
    clip. The clip's logit of the class is the mean of its maps over frames and positions, plus the bias.

    Args:
        video_model: its network ends in a global average pool and a linear layer.
        clip: ``(N, T, 3, H, W)`` or ``(N*T, 3, H, W)``, normalised.
        target: a class, or one for each clip; default: the class each clip is taken for.

    Returns:
        ``(N, T, h, w)`` at the size of the last features, in logits, of either sign.

    Raises:
        TypeError: the model is no VideoClassifier, or the clip is not of floating point.
        ValueError: a clip of another length, a class out of range, or a network whose logits are not linear
            in the mean of its last features (:func:`grad_cam` takes those).
    """
    frames = _frames(video_model, clip)
    model = video_model.model
    name = type(model).__name__
    with _evaluating(video_model), torch.no_grad():
        classifier = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
        if not isinstance(classifier, nn.Linear | nn.Conv2d) or not _splits(model):
            raise ValueError(
                f"CAM needs a linear classifier on pooled features, and {name} has "
                f"{type(classifier).__name__ if _splits(model) else 'no forward_features and forward_head'}; "
                "use grad_cam(video_model, clip, layer=...)"
            )
        output = model.forward_features(frames)  # type: ignore[operator]
        frame_logits = model.forward_head(output.clone())  # type: ignore[operator]
        precise = torch.promote_types(output.dtype, torch.float32)
        features = _channels_first(output, frames, name).to(precise)
        weight = classifier.weight.flatten(1).to(precise)
        linear = None
        with full_precision(features):
            if weight.shape[1] == features.shape[1]:
                bias = 0 if classifier.bias is None else classifier.bias.to(precise)
                linear = features.mean(dim=(2, 3)) @ weight.T + bias
        if linear is None or not _close(linear, frame_logits, output.dtype):
            raise ValueError(
                f"CAM needs logits that are linear in the mean of the last features; {name} pools otherwise, "
                f"or has more layers behind the pool than {type(classifier).__name__}: "
                "use grad_cam(video_model, clip)"
            )
        chosen = _targets(target, to_clips(linear, video_model.n_segment).mean(dim=1))
        with full_precision(features):
            return torch.einsum("nc,ntchw->nthw", weight[chosen], to_clips(features, video_model.n_segment))


def grad_cam(
    video_model: VideoClassifier,
    clip: Tensor,
    target: Target = None,
    layer: str | nn.Module | None = None,
) -> Tensor:
    """Grad-CAM of clips: ``M[t] = relu(sum_c a[t, c] A[t, c])``, ``a[t, c] = mean_hw dy / dA[t, c]``.

    Selvaraju et al., Grad-CAM, ICCV 2017, Eqs. 1, 2. A is the output of ``layer`` in frame t and y the clip's
    logit, the mean over all frames: one backward pass through the whole clip, so that a frame's weights hold
    what it does to the other frames through the temporal modules behind the layer.

    Args:
        video_model: any VideoClassifier.
        clip: ``(N, T, 3, H, W)`` or ``(N*T, 3, H, W)``, normalised.
        target: a class, or one for each clip; default: the class each clip is taken for.
        layer: name of a layer in ``video_model.model``, or the layer itself, whose output is a feature map of
            each frame. Default: what ``forward_features`` returns, the last stage's output.

    Returns:
        ``(N, T, h, w)`` at the size of the layer's output, not negative.

    Raises:
        TypeError: the model is no VideoClassifier, or the clip is not of floating point.
        ValueError: a clip of another length, a class out of range, an unknown layer, or one whose output is
            no feature map, is computed more than once, or has no part in the logits.
    """
    frames = _frames(video_model, clip)
    model = video_model.model
    name, module = _layer(video_model, layer)
    with _evaluating(video_model), torch.inference_mode(False), torch.enable_grad():
        if module is None:
            with torch.no_grad():
                output = model.forward_features(frames)  # type: ignore[operator]
            output = output.detach().requires_grad_()
            frame_logits = model.forward_head(output.clone())  # type: ignore[operator]
            logits = to_clips(frame_logits, video_model.n_segment).mean(dim=1)
        else:
            # gradients reach the layer also in a network whose parameters are frozen
            frames = frames.detach().clone().requires_grad_()
            with _outputs(module) as found:
                logits = video_model(frames)
            if len(found) != 1:
                raise ValueError(
                    f"the layer {name!r} runs {len(found)} times in a pass: choose one that runs once"
                )
            output = found[0]
        features = _channels_first(output, frames, name)
        chosen = _targets(target, logits.detach())
        score = logits.gather(1, chosen[:, None]).sum()  # in eval mode the clips of a batch are independent
        gradient = torch.autograd.grad(score, output, allow_unused=True)[0] if output.requires_grad else None
    if gradient is None:
        raise ValueError(f"the output of the layer {name!r} has no part in the logits: choose another layer")
    precise = torch.promote_types(features.dtype, torch.float32)
    gradient = _channels_first(gradient, frames, name).to(precise)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    maps = (weights * features.detach().to(precise)).sum(dim=1).relu()
    return to_clips(maps, video_model.n_segment)


@dataclass(frozen=True)
class SiteGates:
    """The gates of one temporal module on some clips."""

    block: str
    """Name of the block."""
    layer: str
    """Name of the layer the module precedes or follows, as :func:`~temporal_excite.sites` gives it."""
    stage: int | None
    """2 to 5 for res2 to res5; None where unknown."""
    kind: str
    """Class of the module."""
    gates: dict[str, Tensor]
    """What ``gate`` gives, by path: ``"ste"`` ``(N, T, H, W)``; ``"ce"``, ``"me"``, ``"te"`` and others
    that weigh channels ``(N, T, C)``. ACTION's and TE's are in (0, 1), TEA's motion
    excitation (``"me"``) has either sign."""


def excitations(model: nn.Module, clip: Tensor) -> list[SiteGates]:
    """The excitation masks of every temporal module with a gate, for each frame, in the order of the sites.

    ACTION's are M of Eqs. 2, 8 and 9, taken where the module takes them, on its shifted input y: the
    module's output is ``y * (P + sum_p gates[p])`` over its P paths, and of a module with ``identity_start``
    ``y * (1 + mean_p (2 gates[p] - 1))``. TEA's ME gives ``x * (1 + gates["me"])``; TEFE's TE convolves
    ``x * gates["te"]`` in time. TSM, MTA and FE have no gate.

    Args:
        model: a VideoClassifier, or an injected network.
        clip: ``(N, T, 3, H, W)`` or ``(N*T, 3, H, W)``, normalised.

    Raises:
        TypeError: the clip is not of floating point.
        ValueError: a clip of another length, or a model without such a module.
    """
    video_model = model if isinstance(model, VideoClassifier) else VideoClassifier(model, dropout=0.0)
    frames = _frames(video_model, clip)
    places = sites(video_model.model)
    found: dict[int, dict[str, Tensor]] = {}
    handles = []

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(index, {}).update(
                (path, to_clips(gate, video_model.n_segment)) for path, gate in _gates(module, args[0])
            )

        return take

    with _evaluating(video_model), torch.no_grad():
        try:
            for index, site in enumerate(places):
                for part in _gated(site.module):
                    handles.append(part.register_forward_pre_hook(watch(index)))
            if not handles:
                kinds = sorted({site.kind for site in places})
                raise ValueError(
                    f"{type(video_model.model).__name__} has no module with a gate: "
                    f"it holds {', '.join(kinds) if kinds else 'no temporal modules'}"
                )
            video_model(frames)
        finally:
            for handle in handles:
                handle.remove()
    return [
        SiteGates(site.block, site.layer, site.stage, site.kind, found[index])
        for index, site in enumerate(places)
        if index in found
    ]


def _gated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts of a temporal module that have a gate."""
    gate = getattr(module, "gate", None)  # a layer of that name is not called with the module's input
    if isinstance(module, ActionModule) or (callable(gate) and not isinstance(gate, nn.Module)):
        yield module
    else:
        for child in module.children():
            yield from _gated(child)


def _gates(module: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(path, mask), ``(N*T, C)`` or ``(N*T, H, W)``, of one module for its input."""
    if isinstance(module, ActionModule):
        y = module.shift(x)
        for path in module.paths:
            yield from _gates(getattr(module, path), y)
        return
    names = {STE: "ste", CE: "ce", ME: "me", TEModule: "te"}
    name = next((name for kind, name in names.items() if isinstance(module, kind)), type(module).__name__)
    gate: Tensor = module.gate(x)  # type: ignore[operator]
    yield name, gate.squeeze(1) if gate.shape[1] == 1 and gate.shape[2:] == x.shape[2:] else gate.flatten(1)


def _frames(video_model: VideoClassifier, clip: Tensor) -> Tensor:
    """The clips as frames ``(N*T, 3, H, W)``."""
    if not isinstance(video_model, VideoClassifier):
        raise TypeError(
            f"expected a VideoClassifier, got {type(video_model).__name__}: "
            "wrap the network, VideoClassifier(model, n_segment); a compiled one keeps it as _orig_mod"
        )
    if not isinstance(clip, Tensor) or not clip.is_floating_point():
        kind = clip.dtype if isinstance(clip, Tensor) else type(clip).__name__
        raise TypeError(
            f"expected a clip as the network takes it, of floating point and normalised, got {kind}"
        )
    frames = video_model.frames(clip)
    if not len(frames):
        raise ValueError(f"expected at least one clip, got {tuple(clip.shape)}")
    return frames.clone() if frames.is_inference() else frames


def _targets(target: Target, logits: Tensor) -> Tensor:
    """The class of each clip, ``(N,)``."""
    count, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    try:
        chosen = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target must be a class number, or one for each clip, got {target!r}") from error
    if chosen.dtype.is_floating_point or chosen.dtype.is_complex or chosen.dtype == torch.bool:
        raise TypeError(f"target must be a class number, or one for each clip, got {target!r}")
    if chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != count):
        raise ValueError(f"target must be one class, or {count} of them, one for each clip, got {target!r}")
    chosen = chosen.long().expand(count)
    if wrong := [c for c in chosen.tolist() if not 0 <= c < classes]:
        raise ValueError(f"target {wrong[0]} is out of range: the model has classes 0 to {classes - 1}")
    return chosen


def _splits(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head"))


def _layer(video_model: VideoClassifier, layer: str | nn.Module | None) -> tuple[str, nn.Module | None]:
    """Name and module of a layer; None for what ``forward_features`` gives."""
    model = video_model.model
    if layer is None:
        if not _splits(model):
            raise ValueError(
                f"{type(model).__name__} has no forward_features and forward_head as timm's models have: "
                "name the layer, grad_cam(video_model, clip, layer=...)"
            )
        return "forward_features", None
    known = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in known.items():
            if module is layer:
                return name, module
        raise ValueError(f"{type(model).__name__} does not hold the given {type(layer).__name__}")
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a name or a module, got {type(layer).__name__}")
    names = [name for name in known if name]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=4) or names[:4]
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}; it has {', '.join(near)}, ..")
    return layer, known[layer]


def _channels_first(features: object, frames: Tensor, name: str) -> Tensor:
    """A layer's output as ``(N*T, C, h, w)``."""
    if not isinstance(features, Tensor) or features.ndim != 4 or len(features) != len(frames):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the output of {name!r} is no feature map (N*T, C, h, w) of {len(frames)} frames but {shape}: "
            "choose another layer"
        )
    # networks hold both orders; the frame's proportions tell which dimensions are space
    wanted = log(frames.shape[2] / frames.shape[3])
    _, a, b, c = features.shape
    last = abs(log(a / b) - wanted) < abs(log(b / c) - wanted)
    return features.permute(0, 3, 1, 2) if last else features


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding in ``dtype``."""
    if ours.shape != theirs.shape:
        return False
    largest = theirs.abs().max()
    factor = 1e3 if torch.finfo(dtype).bits >= 32 else 16  # 1e3 would be more than all of a 16-bit value
    return bool((ours - theirs).abs().max() <= factor * torch.finfo(dtype).eps * largest)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in eval mode, without compilation or activation checkpointing, which would bypass hooks;
    afterwards each layer has its own modes again."""
    modes = {module: module.training for module in model.modules()}
    checkpointing = [module for module in modes if getattr(module, "grad_checkpointing", False) is True]
    try:
        model.eval()
        for module in checkpointing:
            module.grad_checkpointing = False  # type: ignore[assignment]
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module in checkpointing:
            module.grad_checkpointing = True  # type: ignore[assignment]


@contextmanager
def _outputs(layer: nn.Module) -> Iterator[list[object]]:
    """What the layer returns while it lasts.

    The network goes on with a copy, so that layers which work in place leave the original.
    """
    found: list[object] = []

    def take(_: nn.Module, __: tuple[object, ...], output: object) -> object:
        found.append(output)
        return output.clone() if isinstance(output, Tensor) else output

    handle = layer.register_forward_hook(take)
    try:
        yield found
    finally:
        handle.remove()
