"""Scores of a model over a data set, and what the papers report of them."""

import csv
import logging
import re
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .._extras import need
from ..ops import positive_int
from .distributed import World, clear_frames, ignore_sigterm, join_world

logger = logging.getLogger(__name__)


def parse_protocol(protocol: str) -> tuple[int, int]:
    """``"3x10"`` is (3 crops, 10 clips), as the papers' tables write it after the number of frames.

    Raises ``ValueError`` for anything but 1 or 3 crops and 1 to 10 clips.
    """
    match = re.fullmatch(r"([13])x([1-9]|10)", protocol)
    if match is None:
        raise ValueError(
            f"protocol must be CROPSxCLIPS with 1 or 3 crops and 1 to 10 clips, got {protocol!r}"
        )
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Evaluation:
    """Scores of every video and what follows from them. Accuracies are in percent."""

    indices: Tensor
    """Position of each video in the data set."""
    scores: Tensor
    """(videos, classes): softmax averaged over the views."""
    targets: Tensor
    labels: tuple[str, ...]
    skipped: int = 0
    """Videos left out because they could not be read."""

    @property
    def ranking(self) -> Tensor:
        """(videos, classes): the classes, best first; of equal ones that with the lower number."""
        return self.scores.argsort(dim=1, descending=True, stable=True)

    def topk(self, k: int) -> float:
        """Share of the videos whose class is among the k best, in percent."""
        best = self.ranking[:, :k]
        return 100.0 * (best == self.targets[:, None]).any(dim=1).double().mean().item()

    @property
    def top1(self) -> float:
        """Top-1 accuracy."""
        return self.topk(1)

    @property
    def top5(self) -> float:
        """Top-5 accuracy."""
        return self.topk(5)

    @property
    def loss(self) -> float:
        """Mean negative log of the averaged softmax score of the true class."""
        chosen = self.scores.gather(1, self.targets[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
        return -chosen.log().mean().item()

    @property
    def predictions(self) -> Tensor:
        """The best class of every video."""
        return self.ranking[:, 0]

    @property
    def confusion(self) -> Tensor:
        """(classes, classes): how many videos of class i were taken for class j."""
        n = len(self.labels)
        return torch.bincount(self.targets * n + self.predictions, minlength=n * n).view(n, n)

    @property
    def per_class(self) -> list[float]:
        """Top-1 accuracy of each class; nan for a class without a video."""
        matrix = self.confusion.double()
        return (100.0 * matrix.diagonal() / matrix.sum(dim=1)).tolist()

    def write_csv(self, path: str | Path, names: Sequence[str], top: int = 5) -> None:
        """One line a video: its name, its class, the ``top`` best classes and their scores.

        ``names``: of all videos of the data set.
        """
        best = self.ranking[:, :top]
        values = self.scores.gather(1, best)
        # file names need not be UTF-8
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            count = best.shape[1]
            heads = [f"{what}{i + 1}" for i in range(count) for what in ("prediction", "score")]
            writer.writerow(["video", "label", *heads])
            for row, index in enumerate(self.indices.tolist()):
                cells: list[Any] = [names[index], self.labels[int(self.targets[row])]]
                for j in range(count):
                    cells += [self.labels[int(best[row, j])], f"{float(values[row, j]):.6f}"]
                writer.writerow(cells)

    def plot_confusion(self, path: str | Path) -> None:
        """The confusion matrix, each row in percent of its class, as a picture (needs matplotlib)."""
        need("matplotlib", "video", "pictures of the confusion matrix")
        from matplotlib.figure import Figure

        matrix = self.confusion.double()
        percent = 100 * matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
        n = len(self.labels)
        side = max(4.0, min(24.0, 2.0 + 0.35 * n))
        figure = Figure(figsize=(side + 1.5, side), layout="constrained")
        axes = figure.add_subplot()
        picture = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(picture, ax=axes, label="share of the class (%)", shrink=0.8)
        axes.set(
            xlabel="predicted", ylabel="true", title=f"Top-1 {self.top1:.1f} % of {len(self.targets)} videos"
        )
        if n <= 60:
            axes.set_xticks(range(n), self.labels, rotation=90, parse_math=False)
            axes.set_yticks(range(n), self.labels, parse_math=False)
        if n <= 20:
            for i in range(n):
                for j in range(n):
                    if matrix[i, j]:
                        color = "white" if percent[i, j] > 50 else "black"
                        axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=color)
        figure.savefig(path, dpi=120)


@torch.inference_mode()
def video_scores(model: nn.Module, clips: Tensor, limit: int | None = None) -> Tensor:
    """Softmax averaged over the views of each video (ACTION-Net, Sec. 4.2, "Inference").

    The model averages its logits over the T frames of a clip. ``clips`` is ``(N, T, 3, H, W)``, or
    ``(N, views, T, 3, H, W)``; the result ``(N, classes)``, float32. ``limit``: clips in one pass.
    """
    views = clips if clips.ndim == 6 else clips.unsqueeze(1)
    flat = views.flatten(0, 1)
    logits = torch.cat([model(part) for part in flat.split(limit or len(flat))])
    scores = finite(logits.float().softmax(dim=1))
    return scores.unflatten(0, views.shape[:2]).mean(dim=1)


def finite(scores: Tensor) -> Tensor:
    """``scores``, or a ``FloatingPointError`` where one is not finite."""
    if not scores.isfinite().all():
        raise FloatingPointError("the network's scores are not finite: its training has diverged")
    return scores


def evaluate(
    model: nn.Module,
    dataset: Any,
    labels: Sequence[str],
    *,
    batch_size: int = 16,
    views: int = 1,
    workers: int = 0,
    world: World | None = None,
    progress: bool = False,
) -> Evaluation:
    """Every video of a data set once, over all processes of ``world``; all of them get the whole result.

    Args:
        model: clips ``(N, T, 3, H, W)`` -> logits; put in eval mode for the time.
        dataset: gives ``(clip or views, label)``. Videos it lists as ``broken`` afterwards (read with
            ``on_error="skip"``) are left out and counted.
        labels: class names.
        batch_size: clips in one pass.
        views: clips of each video; the more there are, the fewer videos are read at a time.
        workers: processes that read videos.
        world: as :func:`~temporal_excite.training.join_world` gives it.
        progress: show a bar.

    Raises:
        ValueError: ``batch_size`` or ``views`` is below 1, the data set is empty, or none of its videos could
            be read.
        FloatingPointError: the model's scores are not finite.
    """
    for name, value in (("batch_size", batch_size), ("views", views)):
        positive_int(name, value)
    world = world or join_world("cpu")
    count = len(dataset) if isinstance(dataset, Sized) else 0
    if not count:
        raise ValueError("the data set to evaluate on is empty")
    indices = world.share_of(count)
    loader = DataLoader(
        dataset,
        max(1, batch_size // views),
        sampler=indices,
        num_workers=workers,
        worker_init_fn=ignore_sigterm,
        generator=torch.Generator(),
    )
    training = model.training
    model.eval()
    scores, targets = [], []
    try:
        with tqdm(total=count, unit="video", disable=not (progress and world.main)) as bar:
            for clips, target in loader:
                scores.append(video_scores(model, clips.to(world.device), batch_size).cpu())
                targets.append(target)
                bar.update(world.size * len(target))
    except BaseException as error:
        clear_frames(error)
        raise
    finally:
        model.train(training)
    mine = (torch.tensor(indices), torch.cat(scores), torch.cat(targets)) if scores else None
    gathered = world.gather((mine, list(getattr(dataset, "broken", ()))))
    shares = [share for share, _ in gathered if share is not None]
    broken = sorted({i for _, some in gathered for i in some})
    all_indices, all_scores, all_targets = (torch.cat(parts) for parts in zip(*shares, strict=True))
    kept = ~torch.isin(all_indices, torch.tensor(broken, dtype=torch.long))
    if broken:
        logger.warning("%d of %d videos could not be read and are left out", len(broken), count)
    if not kept.any():
        raise ValueError(f"none of the {count} videos to evaluate on could be read")
    order = all_indices.argsort()
    order = order[kept[order]]
    return Evaluation(all_indices[order], all_scores[order], all_targets[order], tuple(labels), len(broken))
