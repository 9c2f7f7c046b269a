"""What a trained model is, and its file: written whole or not at all, read without running code."""

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import Tensor

from ..checkpoints import has_values
from ..classifier import VideoClassifier
from ..injection import inject
from ..ops import positive_int

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used for what was asked."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build a model again and to feed it, apart from the weights."""

    backbone: str
    """Name of a timm model."""
    module: str | None
    """Name of a temporal module; None is TSN, the plain backbone."""
    labels: tuple[str, ...]
    """Class names."""
    n_segment: int = 8
    dropout: float = 0.5
    module_args: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of :func:`~temporal_excite.inject`, the module's own included."""
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of ``timm.create_model``."""
    short_side: int = 256
    """Size in pixels the shorter side of a frame is scaled to."""
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dataset: str = "folder"
    """Layout of the data it was trained on."""

    def __post_init__(self) -> None:
        """Raise a ``TypeError`` for what a checkpoint cannot hold."""
        if not isinstance(self.backbone, str) or not isinstance(self.module, str | None):
            raise TypeError(f"backbone and module must be names, got {self.backbone!r} and {self.module!r}")
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
            raise TypeError(f"labels must be class names, got {self.labels!r}")
        for name in ("n_segment", "short_side", "crop"):
            positive_int(name, getattr(self, name))
        for name, value in asdict(self).items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{name} must hold plain values (numbers, strings, None, lists and dicts of these), got "
                    f"{value!r}: a checkpoint, read without running code, cannot hold others"
                ) from error

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, which ``weights_only=True`` and JSON take."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of :meth:`to_dict`; a :class:`CheckpointError` names missing and unknown fields."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"model settings must be a dict, got {values!r}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(f"unknown model settings {unknown}: written by a newer version?")
        if missing := sorted({"backbone", "module", "labels"} - set(values)):
            raise CheckpointError(f"model settings {missing} are missing")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**plain)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"unusable model settings: {error}") from error


def build_model(config: ModelConfig, pretrained: bool = False) -> VideoClassifier:
    """The model a config describes, with new weights, or timm's pretrained ones in the backbone.

    Raises ``ValueError`` for a backbone timm does not know, naming similar ones, or refuses to build, and
    whatever :func:`~temporal_excite.inject` raises.
    """
    if not is_model(config.backbone):
        import difflib

        similar = difflib.get_close_matches(config.backbone, timm.list_models(), n=4)
        hint = f"; similar: {', '.join(similar)}" if similar else "; timm.list_models() lists them"
        raise ValueError(f"timm has no model {config.backbone!r}{hint}")
    try:
        backbone = timm.create_model(
            config.backbone, pretrained=pretrained, num_classes=config.num_classes, **config.backbone_args
        )
    except AssertionError as error:  # timm's way to refuse some values
        given = dict(config.backbone_args)
        raise ValueError(f"timm does not build {config.backbone!r} with {given}: {error}") from error
    if config.module is not None:
        inject(backbone, config.module, config.n_segment, **config.module_args)
    model = VideoClassifier(backbone, n_segment=config.n_segment, dropout=config.dropout)
    model.reset_head(config.num_classes)
    return model


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically: after a crash or on a full disk the old file is whole.

    Raises :class:`CheckpointError`, naming the reason and the space left, when it cannot be written.
    """
    path = Path(path)
    content = {"format": FORMAT, "config": config.to_dict(), "state_dict": dict(state_dict)}
    if training is not None:
        content["training"] = dict(training)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):  # torch reports a full disk as a RuntimeError
            raise
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"cannot write {path}: {reason}{_free_space(path)}; "
            + ("the previous checkpoint there is intact" if path.is_file() else "nothing was written")
        ) from error
    with contextlib.suppress(OSError):  # make the rename itself last, where the system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _free_space(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint: ``config`` (:class:`ModelConfig`), ``state_dict`` and perhaps
    ``training``.

    Read with ``weights_only=True``. Raises ``FileNotFoundError``, and :class:`CheckpointError` for another
    kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to read it with weights_only=False
        raise CheckpointError(
            f"{path} is no readable checkpoint: damaged, or more than tensors and plain values"
        ) from error
    except Exception as error:  # whatever else a damaged or foreign file makes of the unpickler
        raise CheckpointError(f"{path} is no readable checkpoint: {_one_line(error)}") from error
    if not isinstance(content, dict) or not {"format", "config", "state_dict"} <= set(content):
        raise CheckpointError(
            f"{path} holds no temporal-excite checkpoint (format, config, state_dict); "
            "weights released by others load through temporal_excite.load_released"
        )
    kinds = {"format": int, "config": dict, "state_dict": dict}
    if not all(isinstance(content[key], kind) for key, kind in kinds.items()) or not all(
        isinstance(value, Tensor) for value in content["state_dict"].values()
    ):
        raise CheckpointError(f"{path} is no readable checkpoint: save_checkpoint did not write these values")
    if content["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads up to {FORMAT}")
    content["config"] = ModelConfig.from_dict(content["config"])
    return content


def load_weights(model: VideoClassifier, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Load all weights; a :class:`CheckpointError` names what does not fit, and the model is untouched."""
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
    shapes = [
        k
        for k in own
        if k in state_dict and not (own[k].shape == state_dict[k].shape and has_values(state_dict[k]))
    ]
    if missing or extra or shapes:
        example = next(iter(missing or extra or shapes))
        raise CheckpointError(
            f"{source} does not fit this model: {len(missing)} weights missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape or kind (such as {example}); "
            "it was written for another backbone or temporal module"
        )
    model.load_state_dict(dict(state_dict))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[VideoClassifier, ModelConfig]:
    """The trained model of a checkpoint, in eval mode, and its config."""
    content = read_checkpoint(path)
    model = build_model(content["config"])
    load_weights(model, content["state_dict"], path)
    return model.eval().to(device), content["config"]


def _check_sums(path: Path) -> None:
    """Raise where the zip file that ``torch.save`` writes is damaged: ``torch.load`` does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
