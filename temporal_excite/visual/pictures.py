"""Pictures of maps: overlays, figures of rows by frames, animations, channel attention (extra ``visual``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extras import need
from .maps import SiteGates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANIMATIONS = (".gif", ".webp")
PICTURES = (".png", ".pdf", ".svg", ".jpg")


def unnormalise(
    clip: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Tensor:
    """One clip as pictures, ``(T, 3, H, W)`` uint8.

    Args:
        clip: ``(T, 3, H, W)`` or ``(1, T, 3, H, W)``: uint8, which comes back as it is, or
            ``(v - mean) / std`` of values v in [0, 1].
        mean: of the colours; default 0.
        std: of the colours; default 1.

    Raises:
        ValueError: another shape.
    """
    clip = clip.detach().cpu()
    if clip.ndim == 5 and len(clip) == 1:
        clip = clip[0]
    if clip.ndim != 4 or clip.shape[1] != 3:
        raise ValueError(f"expected one clip (T, 3, H, W), got {tuple(clip.shape)}")
    if clip.dtype == torch.uint8:
        return clip
    if not clip.is_floating_point():
        raise ValueError(f"expected a clip of uint8 or of floating point, got {clip.dtype}")
    given = (1.0,) if std is None else std, (0.0,) if mean is None else mean
    scale, shift = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in given)
    return ((clip.float() * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)


def overlay(
    clip: Tensor,
    maps: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    low: float | None = 0.0,
    high: float | None = None,
    alpha: float = 0.5,
    colormap: str = "jet",
) -> Tensor:
    """Maps over the frames of a clip: ``(1 - alpha) frame + alpha colour((map - low) / (high - low))``.

    The maps are scaled to the frames' size (bilinear), and all frames share one scale.

    Args:
        clip: one clip, ``(T, 3, H, W)``, as :func:`unnormalise` takes it.
        maps: ``(T, h, w)`` or ``(1, T, h, w)``.
        mean: of the colours.
        std: of the colours.
        low: value of the first colour, which smaller ones get too; None: the smallest value of the maps.
        high: value of the last colour, which larger ones get too; None: the largest value of the maps.
        alpha: share of the colours, 0 to 1.
        colormap: a name matplotlib knows.

    Returns:
        ``(T, 3, H, W)`` uint8.

    Raises:
        ValueError: shapes that do not go together, maps that are not finite, ``alpha`` out of range, or an
            unknown colormap.
    """
    frames = unnormalise(clip, mean, std)
    maps = maps.detach().cpu().float()
    if maps.ndim == 4 and len(maps) == 1:
        maps = maps[0]
    if maps.ndim != 3 or len(maps) != len(frames):
        raise ValueError(
            f"expected a map for each of the {len(frames)} frames, (T, h, w), got {tuple(maps.shape)}"
        )
    if not maps.isfinite().all():
        raise ValueError("the maps hold values that are not finite")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    need("matplotlib", "visual", "pictures")
    from matplotlib import colormaps

    if colormap not in colormaps:
        raise ValueError(f"matplotlib has no colormap {colormap!r}; it has jet, turbo, viridis, ..")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    low = maps.min().item() if low is None else low
    high = maps.max().item() if high is None else high
    size = (frames.shape[2], frames.shape[3])
    large = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    scaled = ((large - low) / (high - low)).clamp(0, 1) if high > low else torch.zeros_like(large)
    colors = torch.from_numpy(colormaps[colormap](scaled.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    return ((1 - alpha) * frames + alpha * 255 * colors).round().to(torch.uint8)


def figure(
    rows: Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    title: str = "",
    columns: Sequence[int] | None = None,
) -> "Figure":
    """Rows of frames, as in ACTION-Net's Figure 1: a row is the input or one network's overlays.

    Args:
        rows: label of the row -> ``(T, 3, H, W)`` uint8, all with the same T.
        path: written there, as PNG, PDF, SVG or JPEG by its ending.
        title: above the rows.
        columns: the frames to show; default: all.

    Raises:
        ValueError: rows of another shape or dtype, no such frame, or an unknown ending.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: ``path`` cannot be written.
    """
    count = _frame_count(rows)
    columns = range(count) if columns is None else columns
    if not len(columns) or any(not 0 <= t < count for t in columns):
        raise ValueError(f"columns must be frames out of 0 to {count - 1}, got {list(columns)}")
    if path is not None:
        check_path(path, PICTURES)
    need("matplotlib", "visual", "pictures")
    from matplotlib.figure import Figure

    side = 1.25
    height, width = next(iter(rows.values())).shape[2:]
    lines = title.count("\n") + 1 if title else 0
    whole = Figure(
        figsize=(len(columns) * side + 1.1, len(rows) * side * height / width + 0.3 + 0.23 * lines),
    )
    whole.set_layout_engine("constrained", w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.01)
    axes = whole.subplots(len(rows), len(columns), squeeze=False)
    for i, (label, frames) in enumerate(rows.items()):
        for j, t in enumerate(columns):
            axes[i, j].imshow(frames[t].permute(1, 2, 0).numpy())
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].spines[:].set_visible(False)
        axes[i, 0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
    for j, t in enumerate(columns):
        axes[-1, j].set_xlabel(f"frame {t + 1}", fontsize=7)
    if title:
        whole.suptitle(title, fontsize=9, parse_math=False)
    if path is not None:
        _save(whole, path)
    return whole


def animation(rows: Mapping[str, Tensor], path: str | Path, *, fps: float = 4.0, side: int = 224) -> None:
    """The rows side by side, animated, as GIF or WebP by the ending of ``path``.

    Args:
        rows: label -> ``(T, 3, H, W)`` uint8, all with the same T.
        path: written there.
        fps: frames a second.
        side: height in pixels of a picture.

    Raises:
        ValueError: rows of another shape or dtype, ``fps`` or ``side`` out of range, or an unknown ending.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: ``path`` cannot be written.
    """
    count = _frame_count(rows)
    if not 0 < fps < float("inf") or side < 1:
        raise ValueError(f"fps and side must be above 0, got {fps} and {side}")
    check_path(path, ANIMATIONS)
    need("PIL", "visual", "pictures")
    from PIL import Image, ImageDraw, ImageFont

    font, caption, gap = ImageFont.load_default(13), 20, 4
    pictures = []
    for t in range(count):
        tiles = []
        for frames in rows.values():
            tile = Image.fromarray(frames[t].permute(1, 2, 0).contiguous().numpy())
            tiles.append(
                tile.resize((round(side * tile.width / tile.height), side), Image.Resampling.BICUBIC)
            )
        picture = Image.new("RGB", (sum(tile.width + gap for tile in tiles) - gap, side + caption), "white")
        draw, x = ImageDraw.Draw(picture), 0
        for text, tile in zip(rows, tiles, strict=True):
            label = (text.splitlines() or [""])[0]
            while label and draw.textlength(label, font) > tile.width:
                label = label[:-1]
            draw.text((x + 2, 2), label, "black", font)
            picture.paste(tile, (x, caption))
            x += tile.width + gap
        pictures.append(picture)
    try:
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=90
        )
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def attention(gates: Sequence[SiteGates], path: str | Path | None = None, *, clip: int = 0) -> "Figure":
    """Channel attention over time, a heat map for each stage and path: channels down, frames to the right.

    Of each stage the last site is shown, its channels in the order of their mean over time, highest first.
    The colours of a panel span its own values.

    Args:
        gates: of :func:`excitations`.
        path: written there, as PNG, PDF, SVG or JPEG by its ending.
        clip: number of the clip.

    Raises:
        ValueError: no module that weighs channels, or an unknown ending.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: ``path`` cannot be written.
    """
    channel = {
        stage: {path: g[clip] for path, g in site.gates.items() if g.ndim == 3}
        for stage, site in _last_of_stages(gates).items()
    }
    paths = sorted({name for stage in channel.values() for name in stage})
    if not paths:
        raise ValueError("none of these modules weighs channels: CE, ME and ACTION do, STE weighs positions")
    if path is not None:
        check_path(path, PICTURES)
    need("matplotlib", "visual", "pictures")
    from matplotlib.figure import Figure

    stages = [stage for stage, found in channel.items() if found]
    whole = Figure(figsize=(2.1 * len(stages) + 0.6, 2.3 * len(paths) + 0.4), layout="constrained")
    axes = whole.subplots(len(paths), len(stages), squeeze=False)
    for i, name in enumerate(paths):
        for j, stage in enumerate(stages):
            ax = axes[i, j]
            if name not in channel[stage]:
                ax.set_axis_off()
                continue
            values = channel[stage][name].float().cpu()  # (T, C)
            values = values[:, values.mean(dim=0).argsort(descending=True)].T
            picture = ax.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
            ax.set_title(f"{name.upper()}, {_stage_name(stage)}", fontsize=9)
            ax.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1), fontsize=7)
            ax.set_yticks([0, len(values) - 1], [1, len(values)], fontsize=7)
            whole.colorbar(picture, ax=ax).ax.tick_params(labelsize=7)
            if i == len(paths) - 1:
                ax.set_xlabel("frame", fontsize=8)
            if j == 0:
                ax.set_ylabel("channel, by mean gate", fontsize=8)
    if path is not None:
        _save(whole, path)
    return whole


def mask_rows(gates: Sequence[SiteGates], clip: Tensor) -> dict[str, Tensor]:
    """STE's masks of the last site of each stage over one clip ``(T, 3, H, W)`` uint8, as rows of
    :func:`figure`; each row has its own scale."""
    return {
        f"STE\n{_stage_name(stage)}": overlay(clip, site.gates["ste"][0], low=None)
        for stage, site in _last_of_stages(gates).items()
        if "ste" in site.gates
    }


def _last_of_stages(gates: Sequence[SiteGates]) -> dict[int | str, SiteGates]:
    """Stage, or block where it is unknown -> its last site."""
    return {site.block if site.stage is None else site.stage: site for site in gates}


def _stage_name(stage: int | str) -> str:
    return f"res{stage}" if isinstance(stage, int) else stage


def _frame_count(rows: Mapping[str, Tensor]) -> int:
    """The T of all rows."""
    if not rows:
        raise ValueError("expected at least one row of frames")
    for label, frames in rows.items():
        if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
            raise ValueError(
                f"row {label!r} must be uint8 frames (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}"
            )
    counts = {label: len(frames) for label, frames in rows.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"rows have different numbers of frames: {counts}")
    return next(iter(counts.values()))


def check_path(path: str | Path, endings: Sequence[str]) -> None:
    """Raise unless the ending of a file to write is one of ``endings`` and its folder exists."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: the ending must be one of {', '.join(endings)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")


def _save(whole: "Figure", path: str | Path) -> None:
    try:
        whole.savefig(path, dpi=150)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
