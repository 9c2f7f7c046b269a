"""Latency of one step of a stream: causal networks beside the plain backbone on one frame.

python benchmarks/stream.py [--backbone NAME ..] [--modules NAME ..] [--batch N ..] [--compile]
    [--ahead] [--channels-last] [--device cuda] [--repeats 100] [--json FILE]

A step takes one frame of each of N streams. The steps of all networks are interleaved; p50 and p95 are over
the repeats, a ratio is the median over the repeats of the ratio to the plain one, and streams/s is N / p50:
divided by the frames a second of a stream, the number of streams that fit. The state is that of one stream.
--ahead compiles all networks ahead of time, to libraries that need no Python inside.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import timm
import torch
from timing import allow_graphs, layout, output_file, positive, ratio, seconds, write_rows
from torch import nn
from torch._inductor import aoti_compile_and_package, aoti_load_package

import temporal_excite as te

Row = dict[str, float | str]


def networks(backbone: str, options: argparse.Namespace) -> tuple[nn.Module, dict[str, te.Stream]]:
    """The plain backbone, and a stream of it with each module."""
    place = {"device": options.device, "memory_format": layout(options)}
    plain = timm.create_model(backbone).eval().to(**place)
    found = {}
    for name in options.modules:
        model = te.inject(timm.create_model(backbone), name, causal=True)
        found[name] = te.Stream(model.eval().to(**place))
    if options.compile:
        for module in (plain, *(stream.module for stream in found.values())):
            module.compile(dynamic=False)
    return plain, found


def compile_ahead(module: nn.Module, *inputs: object) -> None:
    """Let the module run as a library made for such inputs."""
    vars(module).pop("forward", None)  # the library for other inputs
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(module, inputs)
        path = aoti_compile_and_package(program, package_path=f"{folder}/network.pt2")
        module.forward = aoti_load_package(path)


def steps(stream: te.Stream, frames: torch.Tensor) -> Callable[[], None]:
    """A step on the same frames, each from the state that the one before left."""
    state = stream.initial_state(len(frames), frames.shape[1:])

    def step() -> None:
        nonlocal state
        _, state = stream.step(frames, state)

    return step


def measure(backbone: str, options: argparse.Namespace) -> list[Row]:
    """A row for each number of streams and network."""
    plain, found = networks(backbone, options)
    device = torch.device(options.device)
    rows: list[Row] = []
    for batch in options.batch:
        frames = torch.randn(batch, 3, options.size, options.size, device=device)
        frames = frames.to(memory_format=layout(options))
        if options.ahead:
            compile_ahead(plain, frames)
            for stream in found.values():
                compile_ahead(stream.module, frames, stream.initial_state(batch, frames.shape[1:]))
        calls: dict[str, Callable[[], object]] = {"plain": torch.no_grad()(partial(plain, frames))}
        calls |= {label: steps(stream, frames) for label, stream in found.items()}
        for call in calls.values():  # warm up
            call()
            call()
        times: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(options.repeats):
            for label, call in calls.items():
                times[label].append(seconds(call, device))
        for label in calls:
            p50 = statistics.median(times[label])
            rows.append(
                {
                    "backbone": backbone,
                    "streams": batch,
                    "network": label,
                    "p50_ms": 1e3 * p50,
                    "p95_ms": 1e3 * statistics.quantiles(times[label], n=20, method="inclusive")[-1],
                    "ratio": ratio(times, label),
                    "streams_per_s": batch / p50,
                    "state_bytes": found[label].state_bytes(frames.shape[1:]) if label in found else 0,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet50", "mobilenetv2_100"])
    parser.add_argument("--modules", nargs="+", default=["tsm", "shift", "ste", "ce", "me", "action"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], help="numbers of streams in a step")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compile", action="store_true")
    how.add_argument("--ahead", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=positive, default=224)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {options.repeats}")
    if unknown := [name for name in options.backbone if not timm.is_model(name)]:
        parser.error(f"timm {timm.__version__} has no {', '.join(unknown)}; see timm.list_models()")
    if unknown := set(options.modules) - {*te.module_names(), *te.network_names()}:
        parser.error(f"--modules: unknown {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    if options.compile:
        allow_graphs(len(options.batch) * (len(options.modules) + 1))
    rows = []
    for backbone in options.backbone:
        print(
            f"{backbone:20} {'streams':>7} {'p50 ms':>8} {'p95 ms':>8} {'ratio':>6} {'streams/s':>9} "
            f"{'state bytes':>12}"
        )
        for r in measure(backbone, options):
            print(
                f"  {r['network']:18} {r['streams']:7} {r['p50_ms']:8.1f} {r['p95_ms']:8.1f} "
                f"{r['ratio']:6.3f} {r['streams_per_s']:9.1f} {r['state_bytes']:12,}"
            )
            rows.append(r)
    if options.json:
        write_rows(options.json, options, rows)


if __name__ == "__main__":
    main()
