"""Time, saved bytes, peak memory and FLOPs of each temporal module on a backbone, beside the plain backbone.

python benchmarks/speed.py [--backbone NAME] [--modules tsm,action] [--device cuda] [--compile]
    [--channels-last] [--train] [--repeats 9] [--json FILE] [--plot FILE]

"as published" is the same module computed step by step as the papers write it (as_published.py). The repeats
of all networks are interleaved; a ratio is the median over the repeats of the ratio to the plain one.
"""

import argparse
import ctypes
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from as_published import use_published_forms
from timing import allow_graphs, layout, output_file, picture_file, positive, ratio, seconds, write_rows
from torch import nn

import temporal_excite as te


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes one forward pass keeps for backward: each storage once, the parameters' left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)  # alive to the end, so that no address is used twice
    assert out is not None
    return sum(kept.values())


def peak_bytes(device: torch.device, reset: bool = False) -> float | None:
    """The most memory in use since the last reset: of tensors on a GPU, of the process on Linux."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            # what the allocator keeps of earlier calls would hide what this one needs
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, TypeError):  # TypeError: no C library without a name, on Windows
        return None
    return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def networks(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The backbone, and it with each module; as published too where that form is written down."""
    found = {"plain": timm.create_model(options.backbone)}
    for name in map(str.strip, options.modules.split(",")):
        for label in (name, f"{name} as published"):
            model = timm.create_model(options.backbone)
            te.inject(model, name, n_segment=options.frames, **options.module_args)
            if label == name or use_published_forms(model):
                found[label] = model
    return {
        label: m.train(options.train).to(options.device, memory_format=layout(options))
        for label, m in found.items()
    }


def measure(models: dict[str, nn.Module], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a network; the repeats of all are interleaved."""
    x = torch.randn(options.frames * options.clips, 3, options.size, options.size, device=options.device)
    x = x.to(memory_format=layout(options))
    device = torch.device(options.device)

    def step(model: nn.Module) -> float:
        def call() -> None:
            with torch.set_grad_enabled(options.train):
                out = model(x)
            if options.train:
                out.sum().backward()

        return seconds(call, device)

    if options.compile:
        allow_graphs(len(models))
    runners = {k: torch.compile(m) if options.compile else m for k, m in models.items()}
    peaks = {}
    for label, model in runners.items():  # warm up
        step(model)
        model.zero_grad()
        before = peak_bytes(device, reset=True)
        step(model)
        after = peak_bytes(device)
        peaks[label] = None if before is None or after is None else (after - before) / 2**20
        model.zero_grad()
    times: dict[str, list[float]] = {label: [] for label in runners}
    for _ in range(options.repeats):
        for label, model in runners.items():
            times[label].append(step(model))
            model.zero_grad()
    rows = []
    shape = (options.clips, options.frames, 3, options.size, options.size)
    for label, model in models.items():
        ms = sorted(1e3 * t for t in times[label])
        rows.append(
            {
                "network": label,
                "ms": statistics.median(ms),
                "ms_min": ms[0],
                "ms_max": ms[-1],
                "ratio": ratio(times, label),
                "saved_MiB": saved_bytes(model, x) / 2**20,
                "peak_MiB": peaks[label],
                "GFLOPs": gflops(model, shape, label, options),
            }
        )
    return rows


def gflops(model: nn.Module, shape: tuple[int, ...], label: str, options: argparse.Namespace) -> float | None:
    """By fvcore; of the form that ran."""
    if options.no_count:
        return None
    return te.count(model, shape, fast="as published" not in label).flops / 1e9


def shown(value: float | None, digits: int) -> str:
    """A cell of the table."""
    return f"{'-' if value is None else f'{value:.{digits}f}':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--modules", default="tsm,ste,ce,me,action")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=positive, default=8)
    parser.add_argument("--clips", type=positive, default=1)
    parser.add_argument("--size", type=positive, default=224)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=2)
    for flag in ("--compile", "--channels-last", "--train"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--module-args", type=json.loads, default={}, help="keywords of inject, as JSON")
    parser.add_argument("--no-count", action="store_true", help="leave the FLOPs out")
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--plot", type=picture_file)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        models = networks(options)
    except (RuntimeError, TypeError, ValueError) as error:
        parser.error(str(error))
    rows = measure(models, options)
    print(f"{'network':24} {'ms':>8} {'min..max':>17} {'ratio':>6} {'saved':>7} {'peak':>8} {'GFLOPs':>8}")
    for r in rows:
        spread = f"{r['ms_min']:.1f}..{r['ms_max']:.1f}"
        print(
            f"{r['network']:24} {r['ms']:8.1f} {spread:>17} {r['ratio']:6.3f} {r['saved_MiB']:7.0f} "
            f"{shown(r['peak_MiB'], 0)} {shown(r['GFLOPs'], 3)}"
        )
    if options.json:
        write_rows(options.json, options, rows)
    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
        axes = figure.subplots()
        axes.barh([str(r["network"]) for r in rows][::-1], [float(r["ratio"]) for r in rows][::-1])
        axes.set_xlabel("time, ratio to the plain backbone")
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
