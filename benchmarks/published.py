"""What the papers print. Digits are kept as printed, so they are strings; all else is counted by flops.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One network of a printed table."""

    label: str
    backbone: str
    """A timm architecture."""
    module: str | None
    """As ``inject`` takes it; None: the plain backbone."""
    classes: int
    """Size of the classifier the row was printed with."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of ``inject``."""
    clip: tuple[int, int, int, int] = (8, 3, 224, 224)
    """T, C, H, W."""
    gflops: str | None = None
    mparams: str | None = None
    convention: str = "paper"
    """What the printed GFLOPs count: "paper" (ACTION-Net's) or "fvcore"."""
    baseline: str | None = None
    """Label of the row that eta and the multiple of FLOPs compare with."""
    top1: Mapping[str, str] = field(default_factory=dict)
    """Accuracy by data set."""
    eta: Mapping[str, str] = field(default_factory=dict)
    """Printed efficiency by data set."""
    why: str = ""
    """For a row whose printed complexity does not come out: one line why."""
    eta_why: Mapping[str, str] = field(default_factory=dict)
    """The same for a printed efficiency, by data set."""


@dataclass(frozen=True)
class Table:
    """One printed table."""

    title: str
    rows: tuple[Row, ...]
    eta_title: str = ""
    percent_digits: int | None = None
    """Digits the paper rounded the percentage of FLOPs to before it divided; None: it did not."""
    notes: tuple[str, ...] = ()


EGO, JESTER, SOMETHING = "EgoGesture", "Jester", "Something-Something V2"


def _table3(
    label: str,
    module: str | None,
    classes: int,
    gflops: str | None,
    mparams: str | None,
    top1: str | None,
    eta: str | None,
) -> Row:
    return Row(
        label,
        "resnet50",
        module,
        classes,
        gflops=gflops,
        mparams=mparams,
        baseline="TSM" if eta else None,
        top1={EGO: top1} if top1 else {},
        eta={EGO: eta} if eta else {},
    )


TABLE_3 = Table(
    "ACTION-Net, Table 3: ResNet-50, 8 frames",
    (
        _table3("TSN", None, 83, "33", "23.68", "83.1", None),
        _table3("TSM", "tsm", 83, "33", "23.68", "92.1", None),
        _table3("STE", "ste", 174, "33.1", "23.9", "93.8", "0.18"),
        _table3("CE", "ce", 174, "33.16", "26.08", "93.8", "0.29"),
        _table3("ME", "me", 174, "34.69", "25.9", "93.9", "2.83"),
        _table3("ACTION", "action", 174, "34.75", "28.08", "94.2", "2.52"),
        _table3("learnable shift", "shift", 174, None, None, None, None),
    ),
    eta_title="ACTION-Net, section 4.5: efficiency against TSM",
    percent_digits=1,
    notes=(
        "TSN and TSM were counted with EgoGesture's 83 classes, the others with Something-Something's 174.",
        "STE, CE, ME and ACTION begin with a learnable shift that the text does not mention: the last row "
        "is that shift alone.",
    ),
)

TABLE_4 = Table(
    "ACTION-Net, Table 4: ACTION in some stages of ResNet-50 (the paper prints accuracy alone)",
    (
        Row("TSM", "resnet50", "tsm", 83, top1={EGO: "92.1"}),
        *(
            Row(
                "res" + ",".join(map(str, stages)),
                "resnet50",
                "action",
                83,
                options={"stages": stages},
                baseline="TSM",
                top1={EGO: top1},
            )
            for stages, top1 in (
                ((2,), "92.3"),
                ((2, 3), "92.9"),
                ((2, 3, 4), "93.1"),
                ((2, 3, 4, 5), "94.2"),
            )
        ),
    ),
    eta_title="ACTION-Net, Table 4: efficiency against TSM (not in the paper)",
    notes=("Stages without ACTION are plain here; with TSM's shift in them the counts are the same.",),
)


def _table5(label: str, backbone: str, top1: tuple[str, str, str], **kwargs: Any) -> Row:
    return Row(label, backbone, top1=dict(zip((EGO, JESTER, SOMETHING), top1, strict=True)), **kwargs)


def _etas(*eta: str) -> dict[str, str]:
    return dict(zip((EGO, JESTER, SOMETHING), eta, strict=True))


TABLE_5 = Table(
    "ACTION-Net, Table 5: three backbones, 8 frames",
    (
        _table5(
            "ResNet-50 TSM",
            "resnet50",
            ("92.1", "94.4", "58.7"),
            module="tsm",
            classes=83,
            gflops="33",
            mparams="23.68",
        ),
        _table5(
            "ResNet-50 ACTION",
            "resnet50",
            ("94.2", "97.1", "62.5"),
            module="action",
            classes=174,
            gflops="34.75",
            mparams="28.08",
            baseline="ResNet-50 TSM",
            eta=_etas("2.65", "1.96", "1.40"),
            eta_why={EGO: "needs a gain of 2.0 in Top-1; Table 5 prints 94.2 and 92.1, a gain of 2.1"},
        ),
        _table5(
            "BNInception TSM",
            "bninception",
            ("92.3", "94.6", "53.5"),
            module="tsm",
            classes=83,
            gflops="16.39",
            mparams="10.36",
        ),
        _table5(
            "BNInception ACTION",
            "bninception",
            ("93.2", "96.6", "56.7"),
            module="action",
            classes=83,
            gflops="16.94",
            mparams="11.59",
            baseline="BNInception TSM",
            eta=_etas("3.73", "1.68", "1.05"),
            why="no number of classes gives the printed pair with the released network, ten modules as the "
            "supplement says",
        ),
        _table5(
            "MobileNetV2 TSM",
            "mobilenetv2_100",
            ("92.4", "95.0", "54.9"),
            module="tsm",
            classes=83,
            gflops="2.55",
            mparams="2.33",
        ),
        _table5(
            "MobileNetV2 ACTION",
            "mobilenetv2_100",
            ("93.5", "96.7", "58.5"),
            module="action",
            classes=83,
            gflops="2.57",
            mparams="2.36",
            baseline="MobileNetV2 TSM",
            eta=_etas("0.71", "0.46", "0.22"),
        ),
    ),
    eta_title="ACTION-Net, Figure 4: efficiency of ACTION against TSM",
    notes=(
        "The rows of ResNet-50 are Table 3's, with the numbers of classes they have there.",
        "The text says that ResNet-50 has the highest eta on every data set; the figure's own numbers for "
        "EgoGesture give that place to BNInception.",
    ),
)

SOMETHING_1 = "Something-Something V1"


def _tea(label: str, module: str, top1: str | None, backbone: str = "resnet50", **kwargs: Any) -> Row:
    accuracy = {SOMETHING_1: top1} if top1 else {}
    return Row(label, backbone, module, 174, **{"baseline": "TSM", "top1": accuracy, **kwargs})


TEA = Table(
    "TEA, Tables 1 and 2, Figure 4: TEA and its baselines (FLOPs are printed for TSM and TEA alone)",
    (
        Row("TSM", "resnet50", "tsm", 174, gflops="33", top1={SOMETHING_1: "43.4"}),
        _tea("(2+1)D ResNet", "2plus1d", "46.0"),
        _tea("(2+1)D Res2Net", "2plus1d", "46.2", "res2net50_26w_4s"),
        _tea("MTA", "mta", "47.5", "res2net50_26w_4s"),
        _tea("ME", "2plus1d_me", "48.4"),
        _tea("(2+1)D SENet", "2plus1d_se", "46.5"),
        _tea("ME w/o residual", "2plus1d_me", "47.2", options={"residual": False}),
        _tea("TEA", "tea", "48.9", "res2net50_26w_4s", gflops="35"),
        _tea(
            "TEA, 16 frames",
            "tea",
            None,
            "res2net50_26w_4s",
            gflops="70",
            clip=(16, 3, 224, 224),
            baseline="TEA",
        ),
        _tea("TEA, 256x256", "tea", None, "res2net50_26w_4s", clip=(8, 3, 256, 256), baseline="TEA"),
        _tea("TEA on ResNet-50", "tea", None),
    ),
    eta_title="TEA, Table 1: efficiency against TSM (not in the paper)",
    notes=(
        "The text's 1.06x is TEA against TSM, which is a 2D ResNet-50; against the Res2Net-50 it is built on "
        "TEA adds less.",
        "70 G fits counts with ReLUs and pooling; fvcore's convention gives less.",
        "Tables 2 and 3 print 35 G x 3 x 10 for the accurate protocol, whose crops are 256x256: each view "
        "costs the multiple in the row of that name.",
        "TEA and MTA are counted on Res2Net-50 26w4s, as released; the last row is Figure 3 on ResNet-50, "
        "MTA in the place of each 3x3 convolution.",
    ),
)


def _tefe(label: str, te: tuple[int, ...], fe: tuple[int, ...], top1: str | None, **kwargs: Any) -> Row:
    accuracy = {SOMETHING_1: top1} if top1 else {}
    options = {"te": te, "fe": fe}
    return Row(label, "resnet50", "tefe", 174, options, top1=accuracy, convention="fvcore", **kwargs)


_EIGHT = {"clip": (8, 3, 224, 256), "baseline": "TSN"}
_FINAL = (1, 1, 1, 1), (0, 3, 5, 2)

TEFE = Table(
    "TEFE, Tables 1 and 5: TE and FE blocks in stages 2 to 5, frames of 224x256",
    (
        Row(
            "TSN",
            "resnet50",
            None,
            174,
            clip=(8, 3, 224, 256),
            convention="fvcore",
            top1={SOMETHING_1: "19.9"},
        ),
        _tefe("TE 3,4,6,3", (3, 4, 6, 3), (0, 0, 0, 0), "46.7", **_EIGHT),
        _tefe("FE 0,4,6,3", (0, 0, 0, 0), (0, 4, 6, 3), "46.3", **_EIGHT),
        _tefe("TE 3,3,3,3 FE 0,1,3,0", (3, 3, 3, 3), (0, 1, 3, 0), "47.8", **_EIGHT),
        _tefe("TE 2,2,2,2 FE 0,2,4,1", (2, 2, 2, 2), (0, 2, 4, 1), "48.7", **_EIGHT),
        _tefe("TEFE, 16 frames", *_FINAL, None, gflops="181", clip=(16, 3, 224, 256)),
        _tefe("TEFE, 8 frames", *_FINAL, "50.4", gflops="90", **_EIGHT),
        _tefe("TEFE, 8 frames, 224x224", *_FINAL, None),
    ),
    eta_title="TEFE, Table 5: efficiency against TSN (not in the paper)",
    notes=(
        "90 and 181 G are counts without ReLU and max pooling (fvcore's convention) at the 224x256 of the "
        "paper's tests. 271 G is their sum, two networks on 8 and 16 frames.",
        "TSN's 33 G, which the paper cites, is of 224x224.",
        "Table 5's accuracies are with 16 frames, twice the cost of the 8 its rows are counted with here.",
        "Table 4 and the text give 46.1 for FE alone, Table 5 46.3; for TE alone 43.8 and 46.7.",
        "The linear layers of TE grow with the number of frames, and with them the parameters.",
    ),
)

PAPERS = {"action-net": (TABLE_3, TABLE_4, TABLE_5), "tea": (TEA,), "tefe": (TEFE,)}
TABLES = tuple(table for tables in PAPERS.values() for table in tables)
