"""From a checkpoint and a video to labels, and checkpoints on the Hugging Face hub."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..classifier import VideoClassifier, class_layers
from ..injection import sites
from ..modules.base import is_causal
from ..ops import positive_int
from ..stream import Stream
from ..video import Record
from ..video.dataset import transformed
from .checkpoint import CheckpointError, ModelConfig, build_model, load_weights, read_checkpoint
from .data import protocol_views, test_dataset
from .evaluate import finite, video_scores

HUB = "hf-hub:"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Prediction:
    """A class and its score."""

    label: str
    score: float
    """Softmax, averaged over the views, in [0, 1]."""


class Recognizer:
    """A trained model that takes videos.

    >>> recognizer = Recognizer.from_checkpoint("runs/best.pt")  # doctest: +SKIP
    >>> recognizer("clip.mp4")[0]  # doctest: +SKIP
    Prediction(label='Swiping Left', score=0.97)

    Args:
        model: as :func:`~temporal_excite.training.build_model` gives it for ``config``.
        config: of the model.
        device: where it runs.
    """

    def __init__(
        self, model: VideoClassifier, config: ModelConfig, device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.config = config

    @classmethod
    def from_checkpoint(cls, source: str | Path, device: str | torch.device = "cpu") -> "Recognizer":
        """From a training checkpoint, a folder of :meth:`save_pretrained`, or ``"hf-hub:owner/name"``.

        Weights are read from safetensors or with ``weights_only=True``.

        Raises:
            FileNotFoundError: nothing there.
            CheckpointError: not a checkpoint of this package.
        """
        config, state = _read(source)
        model = build_model(config)
        load_weights(model, state, source)
        return cls(model, config, device)

    def scores(self, video: str | Path | Tensor, protocol: str = "1x1") -> Tensor:
        """Scores of all classes, ``(classes,)``.

        Args:
            video: a video file, a folder of pictures, or frames ``(F, 3, H, W)`` uint8, F of any length.
            protocol: "CROPSxCLIPS", see :func:`~temporal_excite.training.parse_protocol`.

        Raises:
            VideoError: the file cannot be read.
            ValueError: frames of another shape or dtype.
        """
        if isinstance(video, Tensor):
            clips = self._views(video, protocol)
        else:
            clips, _ = test_dataset([Record(Path(video), 0)], self.config, protocol)[0]
        return video_scores(self.model, clips.unsqueeze(0).to(self.device))[0].cpu()

    def __call__(self, video: str | Path | Tensor, top: int = 5, protocol: str = "1x1") -> list[Prediction]:
        """The ``top`` best classes, best first; arguments as :meth:`scores`."""
        return self._best(self.scores(video, protocol), top)

    def live(self, window: int | None = None) -> "LiveRecognizer":
        """Labels frame by frame, of a model with causal modules (``module_args={"causal": True}``).

        Args:
            window: frames whose logits are averaged, the latest; None: all since the start.

        Raises:
            ValueError: the modules are two-sided, or ``window`` is below 1.
        """
        return LiveRecognizer(self, window)

    def _best(self, scores: Tensor, top: int) -> list[Prediction]:
        best = scores.argsort(descending=True, stable=True)[: positive_int("top", top)]
        return [Prediction(self.config.labels[i], scores[i].item()) for i in best.tolist()]

    def _views(self, frames: Tensor, protocol: str) -> Tensor:
        if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or frames.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 frames (F, 3, H, W), got {frames.dtype} of shape {tuple(frames.shape)}"
            )
        sampler, transform = protocol_views(self.config, protocol)
        return transformed(transform, frames[sampler(len(frames))], 0)[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, the files timm keeps on the hub; both or none."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # copies, as safetensors takes no tensors that share memory
        state = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in self.model.state_dict().items()
        }
        config = {
            # timm's fields
            "architecture": self.config.backbone,
            "num_classes": self.config.num_classes,
            "label_names": list(self.config.labels),
            "pretrained_cfg": {"mean": list(self.config.mean), "std": list(self.config.std)},
            "temporal_excite": self.config.to_dict(),
        }
        with TemporaryDirectory(dir=folder) as name:
            written = Path(name)
            save_file(state, written / WEIGHTS, metadata={"format": "pt"})
            (written / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in (WEIGHTS, CONFIG):
                os.replace(written / file, folder / file)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> Any:
        """Upload :meth:`save_pretrained`'s files to the Hugging Face hub; the arguments are
        huggingface_hub's."""
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="temporal-excite")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add model")


def load_initial(model: VideoClassifier, source: str | Path) -> None:
    """Start from another model's weights (fine-tuning): all but a classifier of another number of classes.

    ``source``: as :meth:`Recognizer.from_checkpoint` takes it.
    """
    state = dict(_read(source)[1])
    own = model.state_dict()
    heads = {id(parameter) for layer in class_layers(model.model) for parameter in layer.parameters()}
    for key, parameter in model.named_parameters():
        if id(parameter) in heads and key in state and state[key].shape != own[key].shape:
            state[key] = own[key]
    load_weights(model, state, source)


class LiveRecognizer:
    """A trained model that takes one video while it plays; made by :meth:`Recognizer.live`.

    Over all frames of a clip the last scores are those that :meth:`Recognizer.scores` gives for it.
    """

    def __init__(self, recognizer: Recognizer, window: int | None) -> None:
        config = recognizer.config
        for site in sites(recognizer.model):
            if not is_causal(site.module):
                raise ValueError(
                    f"the checkpoint's {config.module} modules are two-sided, they look at later frames: "
                    "train a causal network, temporal-excite train --module-arg causal=True .."
                )
        self.recognizer = recognizer
        self._stream = Stream(recognizer.model, window)
        _, self._transform = protocol_views(config)
        # the first call for a size runs the network once more: not at the first frame
        self._stream.initial_state(1, (3, config.crop, config.crop))

    def __call__(self, frame: Tensor, top: int = 5) -> list[Prediction]:
        """The ``top`` best classes after the next frame, ``(3, H, W)`` uint8, best first: the softmax of the
        averaged logits."""
        if frame.ndim != 3 or len(frame) != 3 or frame.dtype != torch.uint8:
            raise ValueError(f"expected a uint8 frame (3, H, W), got {frame.dtype} {tuple(frame.shape)}")
        x, _ = transformed(self._transform, frame[None, None], 0)
        consensus = self._stream(x.to(self.recognizer.device)).consensus
        return self.recognizer._best(finite(consensus[0].softmax(0).cpu()), top)

    def reset(self) -> None:
        """Let the next frame be the first."""
        self._stream.reset()


def _download(repo_id: str) -> Sequence[Path]:
    from huggingface_hub import hf_hub_download

    name, _, revision = repo_id.partition("@")
    return [Path(hf_hub_download(name, file, revision=revision or None)) for file in (CONFIG, WEIGHTS)]


def _read(source: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Config and weights of what :meth:`Recognizer.from_checkpoint` takes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if str(source).startswith(HUB):
        config_file, weights_file = _download(str(source).removeprefix(HUB))
    elif path.is_dir():
        config_file, weights_file = path / CONFIG, path / WEIGHTS
        for file in (config_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(f"{path} holds no {file.name}: not a folder of save_pretrained()")
    else:
        content = read_checkpoint(path)
        return content["config"], content["state_dict"]
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))["temporal_excite"]
        return ModelConfig.from_dict(settings), load_file(weights_file)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{source} is no model of temporal-excite: {error!r}") from error
