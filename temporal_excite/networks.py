"""The papers' networks that put several modules into a block, by name for :func:`~temporal_excite.inject`.

Each plan takes the chosen blocks and says which module goes to which of their layers. TEA and the networks it
is compared with (Fig. 4, Table 1): Li et al., CVPR 2020. TEFE: Jiang, Zhang, IEEE Access 2022.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import SEModule
from torch import nn

from .hosts import Block
from .injection import Insertion
from .modules.registry import register_network
from .modules.tea import MTA, MotionExcitation, PartConv
from .modules.tefe import FEModule, TEModule
from .modules.tsm import TemporalConv, TemporalShift
from .passes import ReLU

TEMPORAL_CONVS: dict[str, Callable[..., nn.Module]] = {
    "shift": TemporalConv,
    "cw": partial(TemporalConv, init="random"),
    "conv": partial(TemporalConv, init="random", depthwise=False),
    "tsm": TemporalShift,
}
"""TEA's Table 5: ``factory(channels, n_segment, causal=...)`` of each temporal convolution it compares."""


def tea(
    blocks: list[Block],
    n_segment: int,
    *,
    me: bool = True,
    reduction: int = 16,
    residual: bool = True,
    scale: int | None = None,
    form: str = "released",
    causal: bool = False,
) -> list[Insertion]:
    """``"tea"`` and, with ``me=False``, ``"mta"``: every block a TEA block (Fig. 3; Fig. 4 c).

    On Res2Net blocks all weights stay: temporal convolutions go before the 3x3 convolutions and on the last
    part, ME behind ``conv1-bn1-relu``. With ``form="text"`` the part without convolutions is the last one
    here too, as in the pretrained weights: Eq. 6 with the parts renumbered. On ResNet's bottlenecks a newly
    initialised MTA replaces ``conv2``; ``bn2`` and the activation stay behind it.

    Args:
        blocks: the blocks to change.
        n_segment: T.
        me: with motion excitation.
        reduction: of :class:`~temporal_excite.modules.MotionExcitation`.
        residual: of the same class; ``False`` works on ResNet's bottlenecks only.
        scale: of :class:`~temporal_excite.MTA`; default 4, on Res2Net the block's own.
        form: ``"released"`` or ``"text"``, for both.
        causal: the causal form of all modules.

    Raises:
        ValueError: a block is neither a Res2Net nor a ResNet bottleneck, or a value does not fit it.
    """
    plan = []
    for block in blocks:
        excite = partial(
            MotionExcitation,
            n_segment=n_segment,
            reduction=reduction,
            residual=residual,
            form=form,
            causal=causal,
        )
        if not _is_res2net(block):
            conv = _conv2(block)
            first = getattr(block.module, "downsample", None) is not None
            mta = MTA(
                conv.in_channels,
                n_segment,
                4 if scale is None else scale,
                stride=conv.stride[0],
                stage=first or conv.stride[0] > 1,
                dilation=conv.dilation[0],
                groups=conv.groups,
                form=form,
                causal=causal,
            )
            steps: dict[str, nn.Module] = {"me": excite(conv.in_channels)} if me else {}
            steps["mta"] = mta
            plan.append(Insertion(block, "instead:conv2", " + ".join(steps), _chain(steps)))
            continue
        host: Any = block.module
        if scale not in (None, host.scale):
            raise ValueError(f"{_name(block)} has scale {host.scale}; scale={scale} would need other weights")
        if me:
            excitation = excite(host.width * host.scale)
            excitation.between_relus = True
            plan.append(_behind_relu(block, "me", {"me": excitation}))
        start = "identity" if form == "released" else "shift"
        for i in range(len(host.convs)):
            shift = TemporalConv(host.width, n_segment, init=start, causal=causal)
            plan.append(Insertion(block, f"pre:convs.{i}", f"mta.{i + 1}", shift))
        if form == "released" and host.scale > 1:
            label = f"mta.{host.scale}"
            if host.pool is not None:
                last: nn.Module = TemporalConv(host.width, n_segment, shift_div=2, causal=causal)
                plan.append(Insertion(block, "pre:pool", label, last))
            else:
                # nothing acts on the last part alone: drop_block (mostly an identity) has all parts joined
                last = PartConv(host.width * host.scale, n_segment, width=host.width, causal=causal)
                last.overwrites = True
                plan.append(Insertion(block, "pre:drop_block", label, last))
    return plan


def two_plus_one(
    blocks: list[Block],
    n_segment: int,
    *,
    conv: str = "shift",
    excite: str | None = None,
    causal: bool = False,
    **kwargs: Any,
) -> list[Insertion]:
    """``"2plus1d"`` (Fig. 4 a, b), ``"2plus1d_me"`` (d; f with ``residual=False``), ``"2plus1d_se"`` (e).

    A temporal convolution of all channels after each block's first convolution, and before it ME or SE. On
    Res2Net blocks the convolution follows ``bn1`` (with ME or SE: ``bn1`` and a ReLU) and the block's own
    ReLU follows it; elsewhere it is behind the activation.

    Args:
        blocks: the blocks to change.
        n_segment: T.
        conv: the temporal convolution (Table 5): ``"shift"``, ``"cw"``, ``"conv"`` or ``"tsm"``.
        excite: None, ``"me"`` or ``"se"``.
        causal: the causal form of the convolution and ME.
        **kwargs: for :class:`~temporal_excite.modules.MotionExcitation` or timm's ``SEModule``.

    Raises:
        TypeError: a keyword without ``excite``, which takes none.
        ValueError: an unknown ``conv`` or ``excite``, or a block has no point behind its first convolution.
    """
    if conv not in TEMPORAL_CONVS:
        raise ValueError(f"unknown conv {conv!r}; known: {', '.join(TEMPORAL_CONVS)}")
    if excite not in (None, "me", "se"):
        raise ValueError(f"excite must be None, 'me' or 'se', got {excite!r}")
    plan = []
    for block in blocks:
        anchor = "out:bn1" if _is_res2net(block) else block.anchor("loc2")
        channels = block.channels(anchor)
        steps: dict[str, nn.Module] = {"conv": TEMPORAL_CONVS[conv](channels, n_segment, causal=causal)}
        if excite == "me":
            steps = {"me": MotionExcitation(channels, n_segment, causal=causal, **kwargs), **steps}
        elif excite == "se":
            steps = {"se": SEModule(channels, **{"rd_ratio": 1 / 16, "rd_divisor": 1, **kwargs}), **steps}
        elif kwargs:
            raise TypeError(f"'2plus1d' takes no {', '.join(kwargs)}")
        if excite and _is_res2net(block):
            plan.append(_behind_relu(block, " + ".join(steps), steps))
        else:
            plan.append(Insertion(block, anchor, " + ".join(steps), _chain(steps)))
    return plan


def tefe(
    blocks: list[Block],
    n_segment: int,
    *,
    te: Sequence[int] = (1, 1, 1, 1),
    fe: Sequence[int] = (0, 3, 5, 2),
    reduction: int = 4,
    relu: bool = False,
    causal: bool = False,
) -> list[Insertion]:
    """``"tefe"``: TE in some bottlenecks of a stage, FE in others (section III.C; Table 5).

    TE works on the input of the last 1x1 convolution, behind the 3x3 convolution. FE turns the 3x3
    convolution into ``Conv1 * Conv2`` and keeps its weight as Conv1's centre tap. In each stage the first
    blocks get TE, the next ones FE, and the rest stay plain: the paper gives the numbers but not the order,
    and says that FE works on what TE extracts.

    Args:
        blocks: the blocks to change.
        n_segment: T.
        te: number of TE blocks in stages 2 to 5.
        fe: number of FE blocks in stages 2 to 5.
        reduction: of :class:`~temporal_excite.TEModule`.
        relu: of the same.
        causal: the causal form of all modules.

    Raises:
        ValueError: more TE and FE blocks than a stage has, or a block whose 3x3 convolution is unknown.
    """
    for name, counts in (("te", te), ("fe", fe)):
        if len(counts) != 4 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
            raise ValueError(f"{name} must be four whole numbers, of stages 2 to 5, got {counts!r}")
    stages: dict[int, list[Block]] = {}
    for block in blocks:
        if block.stage not in (2, 3, 4, 5):
            raise ValueError(f"{_name(block)} is in stage {block.stage}; TEFE's counts are for stages 2 to 5")
        stages.setdefault(block.stage, []).append(block)
    plan = []
    for stage, members in stages.items():
        n_te, n_fe = te[stage - 2], fe[stage - 2]
        if n_te + n_fe > len(members):
            raise ValueError(
                f"stage {stage} has {len(members)} blocks to choose from, too few for te={n_te} and fe={n_fe}"
            )
        for block in members[:n_te]:
            anchor = block.anchor("loc3")
            module = TEModule(block.channels(anchor), n_segment, reduction, relu=relu, causal=causal)
            plan.append(Insertion(block, anchor, "te", module))
        for block in members[n_te : n_te + n_fe]:
            enhance = FEModule.around(_conv2(block), n_segment, causal=causal)
            plan.append(Insertion(block, "around:conv2", "fe", enhance))
    if not plan:
        raise ValueError(f"te={tuple(te)} and fe={tuple(fe)} put no module into stages {sorted(stages)}")
    return plan


def _is_res2net(block: Block) -> bool:
    return all(hasattr(block.module, name) for name in ("convs", "width", "scale", "pool", "drop_block"))


def _conv2(block: Block) -> nn.Conv2d:
    """The 3x3 convolution of a ResNet bottleneck."""
    conv = getattr(block.module, "conv2", None)
    if (
        type(conv) is not nn.Conv2d  # a subclass may pad or weigh otherwise
        or not hasattr(block.module, "conv3")
        or conv.kernel_size != (3, 3)
        or conv.in_channels != conv.out_channels
    ):
        raise ValueError(
            f"{_name(block)} is no bottleneck with a plain 3x3 Conv2d 'conv2' of equal width and a 'conv3'; "
            "use a ResNet of Bottleneck blocks, such as resnet50"
        )
    return conv


def _behind_relu(block: Block, part: str, steps: dict[str, nn.Module]) -> Insertion:
    """The steps on ``relu(bn1(..))`` of a Res2Net block, before the block's own ReLU.

    The block calls one ReLU everywhere, so the module hangs on ``bn1`` and has a ReLU itself; the block's own
    changes nothing behind ME, whose factor is positive.
    """
    activation = getattr(block.module, "relu", None)
    if not isinstance(activation, nn.ReLU):
        raise ValueError(f"{_name(block)} must have a ReLU as its activation 'relu', it has {activation}")
    if not getattr(steps.get("me"), "residual", True):
        raise ValueError(
            f"{_name(block)} applies a ReLU behind ME, which would lose the negative half of residual=False; "
            "use it on a ResNet of Bottleneck blocks (TEA, Fig. 4 f)"
        )
    return Insertion(block, "out:bn1", part, _chain({"relu": ReLU(), **steps}))


def _chain(steps: dict[str, nn.Module]) -> nn.Module:
    """The steps as an ``nn.Sequential``; a single step as it is."""
    if len(steps) == 1:
        return next(iter(steps.values()))
    chain = nn.Sequential()
    for name, step in steps.items():
        chain.add_module(name, step)
    return chain


def _name(block: Block) -> str:
    return f"{type(block.module).__name__} ({block.name})"


register_network("tea", tea)
register_network("mta", partial(tea, me=False))
register_network("2plus1d", two_plus_one)
register_network("2plus1d_me", partial(two_plus_one, excite="me"))
register_network("2plus1d_se", partial(two_plus_one, excite="se"))
register_network("tefe", tefe)
