"""From a network on frames to a classifier of clips."""

import inspect
from collections.abc import Sequence

from einops import rearrange, reduce
from torch import Tensor, nn

from .ops import check_model, check_whole_clips, positive_int


class VideoClassifier(nn.Module):
    """The mean of the frames' logits (TSN's average consensus): ``y = 1/T sum_t model(x)[t]``.

    Wang et al., Temporal Segment Networks, ECCV 2016, with dropout before the last linear layer, as released
    for TSM and ACTION-Net. In eval mode, or with ``dropout=0``, the model is simply called. In training mode
    its ``forward_features``, ``forward_head(pre_logits=True)`` and ``get_classifier()`` are called instead,
    with the dropout before the classifier (on top of the model's own ``drop_rate``).

    Args:
        model: a timm CNN, usually injected; gives logits ``(N*T, classes)`` for frames ``(N*T, 3, H, W)``.
        n_segment: T. A model with temporal modules knows it, and this argument may be left out; a model
            without any (TSN) needs it.
        dropout: probability.

    Shape:
        ``(N, T, 3, H, W)`` or ``(N*T, 3, H, W)`` -> ``(N, classes)``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``n_segment`` is missing or contradicts the model, the model cannot be split before its
            last layer, or, when called, clips are not of ``n_segment`` frames.
    """

    def __init__(self, model: nn.Module, n_segment: int | None = None, dropout: float = 0.5) -> None:
        super().__init__()
        check_model(model)
        if n_segment is not None:
            positive_int("n_segment", n_segment)
        found = _held_n_segment(model)
        if n_segment is None and found is None:
            raise ValueError(
                f"{type(model).__name__} holds no temporal modules that tell n_segment: "
                "pass n_segment, or inject(model, ...) first"
            )
        _agree(n_segment, found)
        if dropout and (reason := _cannot_split(model)):
            raise ValueError(
                f"dropout={dropout} needs a model that can be split before its last linear layer, but "
                f"{type(model).__name__} {reason}; pass dropout=0, and create the model with timm's drop_rate"
            )
        self.model = model
        self.dropout = nn.Dropout(dropout)
        self._given_n_segment = n_segment if found is None else None

    @property
    def n_segment(self) -> int:
        """T, read from the model's temporal modules, so that ``set_n_segment`` on either is seen.

        Raises:
            ValueError: the modules disagree, with each other or with what a model without any was given.
        """
        found = _held_n_segment(self.model)
        _agree(self._given_n_segment, found)
        segments = self._given_n_segment if found is None else found
        if segments is None:
            raise ValueError(
                "the model no longer holds temporal modules: wrap it again, VideoClassifier(model, n_segment)"
            )
        return segments

    def forward(self, x: Tensor) -> Tensor:
        segments = self.n_segment  # asks every module: once a call
        logits = self._frame_logits(_as_frames(x, segments))
        return reduce(logits, "(n t) classes -> n classes", "mean", t=segments)

    def frames(self, x: Tensor) -> Tensor:
        """Clips as the frames ``(N*T, 3, H, W)`` the model takes.

        Raises ``ValueError`` for another shape, and for clips not of ``n_segment`` frames.
        """
        return _as_frames(x, self.n_segment)

    def _frame_logits(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout.p):
            return self.model(x)
        features = self.model.forward_head(self.model.forward_features(x), pre_logits=True)  # type: ignore[operator]
        features = self.dropout(features)
        head = self.model.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Conv2d):  # some of timm's classifiers are 1x1 convolutions
            return head(features.flatten(1)[..., None, None]).flatten(1)
        return head(features)

    def reset_head(self, num_classes: int, std: float = 0.001) -> None:
        """Replace the last layer (of each head, if there are several) and initialise it as the released code
        does: weights N(0, ``std``), bias 0.

        Raises:
            ValueError: ``num_classes`` is below 1, or the model has no ``reset_classifier``.
        """
        positive_int("num_classes", num_classes)
        if not std >= 0:
            raise ValueError(f"std must be at least 0, got {std}")
        if not hasattr(self.model, "reset_classifier"):
            raise ValueError(f"{type(self.model).__name__} has no reset_classifier as timm's models have")
        self.model.reset_classifier(num_classes)  # type: ignore[operator]
        like = next(self.model.parameters())
        for head in _heads(self.model):
            head.to(like.device, like.dtype)
        for layer in class_layers(self.model):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def class_layers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The layers of a timm model that return the classes' logits: the last linear or convolutional layer of
    its head, or of each of its heads."""
    layers = []
    for head in _heads(model):
        if isinstance(head, nn.Linear | nn.Conv2d):
            layers.append(head)
        for module in head.modules():
            own = [layer for layer in module.children() if isinstance(layer, nn.Linear | nn.Conv2d)]
            layers += [layer for layer in own[-1:] if layer.weight.shape[0] == model.num_classes]
    return layers


def _heads(model: nn.Module) -> Sequence[nn.Module]:
    heads = model.get_classifier()  # type: ignore[operator]
    return heads if isinstance(heads, tuple | list) else [heads]


def _as_frames(x: Tensor, segments: int) -> Tensor:
    if x.ndim == 5:
        if x.shape[1] != segments:
            raise ValueError(
                f"clips {tuple(x.shape)} have {x.shape[1]} frames, the model n_segment={segments}: "
                f"feed clips of {segments} frames, or set_n_segment(model, {x.shape[1]})"
            )
        x = rearrange(x, "n t c h w -> (n t) c h w")
    elif x.ndim != 4:
        raise ValueError(
            f"expected clips (N, T, 3, H, W) or frames (N*T, 3, H, W), got {x.ndim}-D {tuple(x.shape)}"
        )
    check_whole_clips(x, segments)
    return x


def _held_n_segment(model: nn.Module) -> int | None:
    """The n_segment of a model's temporal modules; None when it holds none."""
    held = None
    for module in model.modules():
        if isinstance(found := getattr(module, "n_segment", None), int):
            if held is not None and found != held:
                raise ValueError(
                    f"the model's temporal modules disagree: n_segment {held} and {found}; "
                    "call set_n_segment(model, T)"
                )
            held = found
    return held


def _agree(given: int | None, held: int | None) -> None:
    if given is not None and held is not None and given != held:
        raise ValueError(
            f"n_segment={given}, but the model's temporal modules have n_segment={held}: "
            f"set_n_segment(model, {given}), or leave n_segment out"
        )


def _cannot_split(model: nn.Module) -> str | None:
    """Why dropout cannot be put before the last linear layer; None if it can."""
    for name in ("forward_features", "forward_head", "get_classifier"):
        if not callable(getattr(model, name, None)):
            return f"has no {name}() as timm's models have"
    if "pre_logits" not in inspect.signature(model.forward_head).parameters:  # type: ignore[arg-type]
        return "has a forward_head() without pre_logits"
    head = model.get_classifier()  # type: ignore[operator]
    # not a layer on pooled features: several heads, none, or one that pools itself
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList | nn.Identity):
        return f"has {type(head).__name__} as its classifier"
    if hasattr(head, "global_pool"):
        return f"pools in its classifier, {type(head).__name__}"
    for name, part in model.named_children():  # with a norm of its own, which would be left out
        if isinstance(part, nn.Sequential) and any(layer is head for layer in part.children()):
            return f"has other layers beside its classifier, in {name}"
    return None
