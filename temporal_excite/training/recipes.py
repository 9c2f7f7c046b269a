"""Training recipes of the papers, as data. ``sources`` names the source of every number."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ACTION_TEXT = "ACTION-Net, Sec. 4.2"
ACTION_CODE = "ACTION-Net, released code"
TEA_TEXT = "TEA, Appendix B.2"
TEFE_TEXT = "TEFE, implementation details"
TSM_README = "TSM, README of the released code"


@dataclass(frozen=True)
class Recipe:
    """How one paper trains on one data set.

    The learning rate belongs to the recipe's batch size and scales linearly with the batch used
    (Goyal et al., "Accurate, large minibatch SGD", 2017; TEA, Appendix B.2).
    """

    name: str
    dataset: str
    """Layout of the data folder, see docs/data.md."""
    epochs: int
    lr: float
    batch_size: Mapping[int, int]
    """Clips in one optimiser step, for each number of segments the paper trains with."""
    weight_decay: float
    milestones: tuple[int, ...] = ()
    """Epochs (counted from 0) at whose start the learning rate falls by ``gamma``; none: cosine."""
    dropout: float = 0.5
    n_segment: int = 8
    gamma: float = 0.1
    warmup: float = 0.0
    """Part of the training in which the learning rate rises linearly from 0."""
    optimizer: str = "momentum"
    """Name for ``timm.optim.create_optimizer_v2``; "momentum" is SGD without Nesterov."""
    momentum: float = 0.9
    clip_grad: float | None = 20.0
    batch_norm: str = "train"
    """"train", "partial" (TSN's partial BN: all but the first frozen) or "frozen"."""
    bias_lr: float = 2.0
    """Learning rate of biases, relative."""
    head_lr: float = 5.0
    """Learning rate of the last linear layer, relative; its bias has ``head_lr * bias_lr``."""
    head_decay: float = 1.0
    """Weight decay of the last linear layer's weight, relative."""
    short_side: int = 256
    crop: int = 224
    sources: Mapping[str, str] = field(default_factory=dict)

    def batch(self, n_segment: int) -> int:
        """Clips in one optimiser step at ``n_segment``; where the paper states none, at its first number of
        segments."""
        return self.batch_size.get(n_segment, next(iter(self.batch_size.values())))


def _sources(first: str, /, **others: str) -> dict[str, str]:
    """``first`` for the numbers every recipe states, ``others`` where they stand elsewhere."""
    stated = ("epochs", "lr", "batch_size", "weight_decay", "milestones", "n_segment", "gamma", "momentum")
    released = {
        "dropout": first,
        "optimizer": first,
        "bias_lr": ACTION_CODE,
        "head_lr": ACTION_CODE,
        "head_decay": ACTION_CODE,
        "clip_grad": f"{ACTION_CODE} and {TSM_README}",
        "batch_norm": first,
        "short_side": first,
        "crop": first,
        "warmup": "none in any of the papers",
    }
    return dict.fromkeys(stated, first) | released | others


def _action(dataset: str, epochs: int, milestones: tuple[int, ...], schedule: str = ACTION_TEXT) -> Recipe:
    return Recipe(
        name=dataset,
        dataset=dataset,
        epochs=epochs,
        milestones=milestones,
        lr=0.01,
        batch_size={8: 64, 16: 48},
        weight_decay=5e-4,
        sources=_sources(
            ACTION_TEXT,
            dropout=ACTION_CODE,
            batch_norm="ACTION-Net does not mention frozen BN",
            epochs=schedule,
            milestones=schedule,
        ),
    )


def _tea(dataset: str, lr: float, weight_decay: float) -> Recipe:
    return Recipe(
        name=f"tea-{dataset}",
        dataset=dataset,
        epochs=50,
        milestones=(30, 40, 45),
        lr=lr,
        batch_size={8: 64},
        weight_decay=weight_decay,
        head_decay=5.0,
        sources=_sources(
            TEA_TEXT,
            head_lr=TEA_TEXT,
            head_decay=TEA_TEXT,
            momentum=TSM_README,
            short_side="TEA, Sec. 4.2",
            crop="TEA, Sec. 4.2",
            n_segment="TEA, Sec. 4.2",
        ),
    )


def _tea_finetune(dataset: str) -> Recipe:
    return replace(
        _tea(dataset, 0.001, 5e-4),
        name=dataset,
        epochs=25,
        milestones=(10, 20),
        dropout=0.8,
        batch_norm="partial",
    )


def _tefe(dataset: str) -> Recipe:
    return Recipe(
        name=f"tefe-{dataset}",
        dataset=dataset,
        epochs=50,
        milestones=(30, 40, 45),
        lr=0.001,
        batch_size={8: 20, 16: 10},
        weight_decay=5e-4,
        sources=_sources(
            TEFE_TEXT,
            dropout="not in TEFE; as ACTION-Net",
            batch_norm="not in TEFE; as ACTION-Net",
            short_side=f"{TEFE_TEXT}: a side in [256, 320], here 256 with multi-scale crops",
        ),
    )


def _tsm(dataset: str, lr: float, batch: int, weight_decay: float) -> Recipe:
    return Recipe(
        name=f"tsm-{dataset}",
        dataset=dataset,
        epochs=50,
        milestones=(20, 40),
        lr=lr,
        batch_size={8: batch},
        weight_decay=weight_decay,
        sources=_sources(
            TSM_README,
            clip_grad=TSM_README,
            weight_decay=f"{TSM_README} (its default where the command names none)",
            momentum="TSM, released code (default)",
            short_side="TSN, Sec. 3.2",
            crop="TSN, Sec. 3.2",
        ),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _action("sthv2", 50, (30, 40, 45)),
        _action(
            "jester",
            30,
            (10, 20, 25),
            schedule=f"{ACTION_TEXT} (the released script: 25 epochs, milestones 5, 10, 15)",
        ),
        _action("egogesture", 25, (5, 10, 15)),
        _tea("sthv1", 0.02, 5e-4),
        _tea("sthv2", 0.02, 5e-4),
        _tea("kinetics", 0.01, 1e-4),
        _tea_finetune("ucf101"),
        _tea_finetune("hmdb51"),
        _tefe("sthv1"),
        _tefe("sthv2"),
        _tsm("kinetics", 0.02, 128, 1e-4),
        _tsm("sthv1", 0.01, 64, 5e-4),
        _tsm("sthv2", 0.01, 64, 5e-4),
    )
}
"""The recipes by name."""


def get_recipe(name: str) -> Recipe:
    """The recipe called ``name``; a ``ValueError`` listing the known ones otherwise."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]
