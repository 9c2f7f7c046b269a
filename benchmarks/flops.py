"""Counts the networks of the papers' complexity tables and compares with what is printed there.

    python benchmarks/flops.py [--paper action-net|tea|tefe|all] [--markdown FILE] [--json FILE] [--plot FILE]
    python benchmarks/flops.py --backbone [NAME ...] [--module NAME]

The second form counts any of timm's networks before and after injecting; without a name, a list of
popular ones, ACTION-Net's Table 5 with the backbones of today.

"counted" is the convention of ACTION-Net's tables, "fvcore" fvcore's own (docs/complexity.md). A row fits
when the count rounds to the printed digits, both GFLOPs and parameters; TEFE's are compared by fvcore's
convention, the others by ACTION-Net's. G: 1e9 multiply-accumulates, M: 1e6.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import timm
from published import PAPERS, TABLE_5, Row, Table
from timing import output_file, picture_file

import temporal_excite as te
from temporal_excite._text import columns
from temporal_excite.complexity import Complexity, count_all

Cells = Sequence[object]


@dataclass(frozen=True)
class Eta:
    """One efficiency: printed, from the printed digits as the paper divides, and from our counts."""

    label: str
    dataset: str
    delta_top1: float
    printed: str | None
    from_printed: float | None
    counted: float
    why: str

    @property
    def fits(self) -> bool | None:
        """Whether the printed digits give the printed efficiency; None where nothing is printed."""
        if self.printed is None or self.from_printed is None:
            return None
        return _fits(self.from_printed, self.printed)


@dataclass(frozen=True)
class Result:
    """A row and its counts."""

    row: Row
    paper: Complexity
    fvcore: Complexity
    base: Complexity | None = None
    """The baseline's count, in the convention the row is printed in."""

    @property
    def counted(self) -> Complexity:
        """The count in the convention the row is printed in."""
        return self.fvcore if self.row.convention == "fvcore" else self.paper

    @property
    def fits(self) -> bool | None:
        """Whether GFLOPs and parameters round to the printed ones; None where nothing is printed."""
        counted = self.counted
        pairs = ((counted.flops / 1e9, self.row.gflops), (counted.parameters / 1e6, self.row.mparams))
        checks = [_fits(value, printed) for value, printed in pairs if printed is not None]
        return all(checks) if checks else None


def run(table: Table) -> tuple[list[Result], list[Eta]]:
    """Count all networks of a table."""
    rows = {row.label: row for row in table.rows}
    results = {}
    for row in table.rows:
        base = None
        if row.baseline is not None:
            base = _count(rows[row.baseline], row.classes)[row.convention]
        results[row.label] = Result(row, **_count(row, row.classes), base=base)
    etas = []
    for row in table.rows:
        if row.baseline is None:
            continue
        base = results[row.baseline].row
        # like for like: the same counter and the same number of classes on both sides
        found = results[row.label]
        assert found.base is not None
        percent = _percent(found.counted.flops, found.base.flops)
        printed_percent = None
        if row.gflops and base.gflops:
            printed_percent = _percent(float(row.gflops), float(base.gflops))
            if table.percent_digits is not None:
                printed_percent = round(printed_percent, table.percent_digits)
        for dataset, top1 in row.top1.items():
            gain = round(float(top1) - float(base.top1[dataset]), 1)
            etas.append(
                Eta(
                    row.label,
                    dataset,
                    gain,
                    row.eta.get(dataset),
                    None if printed_percent is None else te.efficiency(printed_percent, gain),
                    te.efficiency(percent, gain),
                    row.eta_why.get(dataset, ""),
                )
            )
    return list(results.values()), etas


def complexity_cells(results: Iterable[Result]) -> list[Cells]:
    """Header and rows of the complexity table."""
    header = (
        "network",
        "classes",
        "printed G",
        "counted G",
        "difference",
        "fvcore G",
        "x baseline",
        "printed M",
        "counted M",
        "fits",
    )
    return [
        header,
        *(
            (
                r.row.label,
                r.row.classes,
                r.row.gflops,
                f"{r.paper.flops / 1e9:.4f}",
                None if r.row.gflops is None else f"{r.counted.flops / 1e9 - float(r.row.gflops):+.4f}",
                f"{r.fvcore.flops / 1e9:.4f}",
                None if r.base is None else f"{r.counted.flops / r.base.flops:.4f}",
                r.row.mparams,
                f"{r.paper.parameters / 1e6:.4f}",
                _mark(r.fits),
            )
            for r in results
        ),
    ]


def eta_cells(etas: Iterable[Eta]) -> list[Cells]:
    """Header and rows of the efficiency table."""
    header = ("network", "data set", "gain in Top-1", "printed eta", "from printed", "like for like", "fits")
    return [
        header,
        *(
            (
                e.label,
                e.dataset,
                e.delta_top1,
                e.printed,
                None if e.from_printed is None else f"{e.from_printed:.3f}",
                f"{e.counted:.3f}",
                _mark(e.fits),
            )
            for e in etas
        ),
    ]


def footnotes(table: Table, results: Iterable[Result], etas: Iterable[Eta]) -> list[str]:
    """One line for each misfit, then the table's notes."""
    return [
        *(f"{r.row.label}: {r.row.why}" for r in results if r.fits is False),
        *(f"{e.label}, {e.dataset}: {e.why}" for e in etas if e.fits is False),
        *table.notes,
    ]


def text(table: Table, results: Sequence[Result], etas: Sequence[Eta]) -> str:
    parts = [table.title, *columns(complexity_cells(results))]
    if etas:
        parts += ["", table.eta_title, *columns(eta_cells(etas))]
    return "\n".join([*parts, *(f"* {note}" for note in footnotes(table, results, etas)), ""])


def markdown(table: Table, results: Sequence[Result], etas: Sequence[Eta]) -> str:
    parts = [f"### {table.title}", "", *_markdown_table(complexity_cells(results)), ""]
    if etas:
        parts += [f"#### {table.eta_title}", "", *_markdown_table(eta_cells(etas)), ""]
    return "\n".join([*parts, *(f"- {note}" for note in footnotes(table, results, etas)), ""])


def as_dict(table: Table, results: Iterable[Result], etas: Iterable[Eta]) -> dict[str, object]:
    return {
        "title": table.title,
        "notes": table.notes,
        "networks": [
            {
                **asdict(r.row),
                "counted": {
                    "paper": r.paper.flops,
                    "fvcore": r.fvcore.flops,
                    "parameters": r.paper.parameters,
                },
                "not_counted_by_fvcore": r.fvcore.skipped,
                "fits": r.fits,
            }
            for r in results
        ],
        "efficiency": [{**asdict(e), "fits": e.fits} for e in etas],
    }


def plot(path: Path, results: Sequence[Result], etas: Sequence[Eta]) -> None:
    """ACTION-Net's Figure 4 redrawn: Top-1 against GFLOPs, one panel a data set."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    by_label = {r.row.label: r for r in results}
    datasets = list(dict.fromkeys(e.dataset for e in etas))
    figure = Figure(figsize=(4.4 * len(datasets), 4.4), layout="constrained")
    for axes, dataset in zip(figure.subplots(1, len(datasets)), datasets, strict=True):
        for number, eta in enumerate(e for e in etas if e.dataset == dataset):
            network = by_label[eta.label]
            pair = (by_label[str(network.row.baseline)], network)
            accuracy = [float(r.row.top1[dataset]) for r in pair]
            counted = [r.paper.flops / 1e9 for r in pair]
            style = {"color": f"C{number}", "linestyle": ""}
            axes.plot(counted, accuracy, color=f"C{number}", linewidth=1)
            for r, x, y, marker in zip(pair, counted, accuracy, "os", strict=True):
                axes.plot(x, y, marker, markersize=5, **style)
                axes.plot(float(r.row.gflops or "nan"), y, marker, markersize=11, fillstyle="none", **style)
            label = f"{pair[0].row.label.split()[0]}\n$\\eta$ {eta.counted:.2f}\n(printed {eta.printed})"
            place = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center", "va": "top"}
            axes.annotate(label, (counted[0], accuracy[0]), color=f"C{number}", fontsize=8, **place)
        axes.set(title=dataset, xlabel="GFLOPs", xlim=(-7, 44), xticks=range(0, 41, 10))
        axes.margins(y=0.3)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Top-1 accuracy [%]")
    markers = (("TSM, counted", "o", "full"), ("TSM, printed", "o", "none"))
    markers += (("ACTION, counted", "s", "full"), ("ACTION, printed", "s", "none"))
    handles = [
        Line2D(
            [],
            [],
            color="black",
            linestyle="",
            marker=m,
            fillstyle=f,
            markersize=5 if f == "full" else 11,
            label=n,
        )
        for n, m, f in markers
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)


POPULAR = (
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "convnext_tiny",
    "regnety_040",
    "repvit_m1",
    "hgnetv2_b2",
    "densenet121",
    "fasternet_t0",
)


def backbone_cells(names: Iterable[str], module: str, classes: int = 174) -> list[Cells]:
    """Header and rows: any backbone before and after ``inject(model, module)``, 8 frames of 224x224."""
    clip = (8, 3, 224, 224)
    cells: list[Cells] = [("backbone", "sites", "M before", "M after", "G before", "G after", "more G")]
    for name in names:
        before = _network(name, None, classes, clip, "{}")["fvcore"]
        after = _network(name, module, classes, clip, "{}")["fvcore"]
        numbers = (before.parameters / 1e6, after.parameters / 1e6, before.flops / 1e9, after.flops / 1e9)
        percent = f"{_percent(after.flops, before.flops):+.2f} %"
        cells.append((name, len(after.sites), *(f"{n:.3f}" for n in numbers), percent))
    return cells


def print_backbones(names: Iterable[str], module: str, path: Path | None) -> None:
    """Print the table of :func:`backbone_cells`, and write it to ``path``."""
    title = f"{module} on 8 frames of 224x224, 174 classes, by fvcore's convention"
    cells = backbone_cells(names, module)
    print("\n".join([title, *columns(cells)]))
    if path:
        path.write_text("\n".join([f"### {title}", "", *_markdown_table(cells), ""]))


@cache
def _network(
    backbone: str, module: str | None, classes: int, clip: tuple[int, ...], options: str
) -> dict[str, Complexity]:
    model = timm.create_model(backbone, num_classes=classes)
    if module is not None:
        te.inject(model, module, n_segment=clip[0], **json.loads(options))
    return count_all(model, clip)


def _count(row: Row, classes: int) -> dict[str, Complexity]:
    return _network(row.backbone, row.module, classes, row.clip, json.dumps(dict(row.options)))


def _percent(value: float, base: float) -> float:
    return 100 * (value / base - 1)


def _fits(value: float, printed: str) -> bool:
    return f"{value:.{len(printed.partition('.')[2])}f}" == printed


def _mark(fits: bool | None) -> str | None:
    return None if fits is None else "yes" if fits else "NO"


def _markdown_table(cells: Sequence[Cells]) -> list[str]:
    lines = ["| " + " | ".join("-" if c is None else str(c) for c in row) + " |" for row in cells]
    return [lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in (("markdown", "the tables"), ("json", "all numbers"), ("plot", "Figure 4 redrawn")):
        kind = picture_file if name == "plot" else output_file
        parser.add_argument(f"--{name}", type=kind, metavar="FILE", help=f"write {what} to FILE")
    parser.add_argument("--paper", choices=[*PAPERS, "all"], help="whose tables (default: action-net)")
    parser.add_argument("--backbone", nargs="*", metavar="NAME", help="count these instead (none: a list)")
    parser.add_argument("--module", help="module for --backbone (default: action)")
    args = parser.parse_args(argv)
    if args.backbone is not None:
        if args.json or args.plot:
            parser.error("--backbone writes --markdown alone: leave --json and --plot out")
        if args.paper:
            parser.error("--backbone prints no paper's tables: leave --paper out")
        if unknown := [name for name in args.backbone if not timm.is_model(name)]:
            parser.error(f"timm {timm.__version__} has no {', '.join(unknown)}; see timm.list_models()")
        module = args.module or "action"
        if module not in (known := [*te.module_names(), *te.network_names()]):
            parser.error(f"--module must be one of {', '.join(known)}, got {module!r}")
        try:
            print_backbones(args.backbone or POPULAR, module, args.markdown)
        except ValueError as error:  # no site
            parser.error(str(error))
        return
    if args.module:
        parser.error("--module goes with --backbone NAME")
    papers = list(PAPERS) if args.paper == "all" else [args.paper or "action-net"]
    tables = [table for paper in papers for table in PAPERS[paper]]
    if args.plot and TABLE_5 not in tables:
        parser.error(f"--plot draws ACTION-Net's Figure 4: leave --paper {args.paper} out")
    done = []
    for table in tables:
        done.append((table, *run(table)))
        print(text(*done[-1]), flush=True)
    if args.markdown:
        args.markdown.write_text("\n".join(markdown(*d) for d in done))
    if args.json:
        args.json.write_text(json.dumps([as_dict(*d) for d in done], indent=1) + "\n")
    if args.plot:
        plot(args.plot, *next(rest for table, *rest in done if table is TABLE_5))


if __name__ == "__main__":
    main()
