"""The training loop: one process or many, stopped and continued at any step."""

import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..classifier import VideoClassifier
from .checkpoint import CheckpointError, ModelConfig, load_weights, read_checkpoint, save_checkpoint
from .distributed import TrainBatches, World, clear_frames, ignore_sigterm, join_world, mix, on_sigterm
from .evaluate import Evaluation, evaluate
from .optim import create_optimizer, create_schedule, freeze_batch_norm
from .progress import RunLog, truncate_log
from .recipes import Recipe

AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOT_COMPARED = ("workers", "progress", "tensorboard", "save_every", "log_every", "compile", "sources")


@dataclass(frozen=True)
class RunOptions:
    """How to run a recipe on this machine."""

    batch_size: int | None = None
    """Clips in one optimiser step, over all processes and accumulated passes; None: the recipe's."""
    accumulate: int = 1
    """Passes a step's clips are cut into."""
    group: int = 1
    """Consecutive items of the training set that always come in one pass, such as a clip and its reverse."""
    lr: float | None = None
    """Learning rate at this batch size; None: the recipe's, scaled by ``batch_size / recipe's batch
    size``."""
    seed: int = 0
    workers: int = 0
    """Processes that read videos, for each training process."""
    amp: str = "off"
    """"off", "bfloat16" or "float16" (with loss scaling)."""
    compile: bool = False
    """``torch.compile`` the model."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated and kept; 0: none."""
    sync_bn: bool = False
    """Batch statistics over all processes (CUDA only)."""
    save_every: int = 0
    """Optimiser steps between two saves within an epoch; 0: save only after each epoch."""
    log_every: int = 10
    """Optimiser steps between two lines of the log."""
    evaluate_every: int = 1
    """Epochs between two validations; the last epoch always has one."""
    progress: bool = True
    tensorboard: bool = False


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    finished: bool
    """False: stopped by SIGTERM, to be resumed."""
    checkpoint: Path
    """``last.pt``."""
    evaluation: Evaluation | None
    """The last validation of this session."""


def train(
    model: VideoClassifier,
    config: ModelConfig,
    recipe: Recipe,
    train_set: Any,
    val_set: Any | None,
    output: str | Path,
    *,
    options: RunOptions | None = None,
    world: World | None = None,
    resume: bool = False,
    on_epoch: Callable[[int, Evaluation], None] | None = None,
) -> RunResult:
    """Train a model by a recipe.

    Writes to ``output``: ``last.pt`` after every epoch (and ``save_every`` steps, and SIGTERM), ``best.pt``
    (best Top-1 on the validation set, without the training state) and ``log.jsonl``.

    Every random number is a function of the seed and of what it is for: the order of the clips of (seed,
    epoch), a clip's frames and augmentation of (seed, epoch, index), dropout of (seed, step, process). With
    the model, the optimiser, the moving average, the loss scale and the step in the checkpoint, a resumed
    run is the uninterrupted one, on the CPU bit for bit.

    Args:
        model: what :func:`~temporal_excite.training.build_model` made of ``config``.
        config: goes into the checkpoints.
        recipe: epochs, learning rate and so on.
        train_set: map-style, gives ``(clip, label)``; its ``set_epoch(epoch)``, where it has one, is called.
        val_set: gives ``(clip or views, label)``; None: no validation.
        output: folder of the run.
        options: how to run.
        world: this process among others (:func:`~temporal_excite.training.join_world`).
        resume: go on from ``output/last.pt``, or start where there is none.
        on_epoch: called with (epoch, evaluation) after each validation, in every process.

    Raises:
        ValueError: an option out of range, or a batch that does not divide.
        CheckpointError: a checkpoint that cannot be written, or belongs to another model or recipe.
        FileExistsError: ``output`` holds a run and ``resume`` is not set.
        FloatingPointError: the loss is not finite.
    """
    run = _Run(
        model, config, recipe, train_set, val_set, Path(output), options or RunOptions(), world, resume
    )
    try:
        return run.fit(on_epoch)
    except BaseException as error:
        clear_frames(error)
        raise
    finally:
        run.log.close()


class _Run:
    def __init__(
        self,
        model: VideoClassifier,
        config: ModelConfig,
        recipe: Recipe,
        train_set: Any,
        val_set: Any | None,
        output: Path,
        options: RunOptions,
        world: World | None,
        resume: bool,
    ) -> None:
        self.world = world = world or join_world("cpu")
        self.config, self.options, self.output = config, options, output
        self.recipe = recipe = replace(recipe, dropout=config.dropout, n_segment=config.n_segment)
        self.train_set, self.val_set = train_set, val_set
        _check(options, recipe, world)
        base = recipe.batch(config.n_segment)
        batch = base if options.batch_size is None else options.batch_size
        self.lr = options.lr if options.lr is not None else recipe.lr * batch / base
        self.batches = TrainBatches(
            len(train_set), batch, options.accumulate, options.seed, world, options.group
        )
        resume = _prepare(output, resume, world)

        self.model = model.to(world.device)
        if options.sync_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self._train_mode()
        self.optimizer = create_optimizer(self.model, self.lr, recipe)
        self.schedule = create_schedule(self.optimizer, recipe, self.batches.steps)
        dtype = AMP[options.amp]
        self.autocast = (
            contextlib.nullcontext if dtype is None else lambda: torch.autocast(world.device.type, dtype)
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "float16")
        self.ema = ModelEmaV3(self.model, decay=options.ema) if options.ema else None
        self.epoch = self.updates = 0
        self.best = -1.0
        # (summed loss, correct clips, clips) of the epoch over all processes, until now and the last report
        self.totals, self.reported = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        if resume:
            self._restore()
        network: nn.Module = self.model
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids)
        self.parallel = network
        self.network = torch.compile(network) if options.compile else network
        self.loader = DataLoader(
            train_set,
            batch_sampler=self.batches,
            num_workers=options.workers,
            persistent_workers=False,  # new ones each epoch: they copy the data set with its epoch
            pin_memory=world.device.type == "cuda",
            worker_init_fn=ignore_sigterm,
            generator=torch.Generator(),  # the workers' seeds: nothing is drawn from the global one
        )
        self.log = RunLog(
            output,
            world,
            total=recipe.epochs * self.batches.steps * batch,
            done=self.updates * batch,
            step=self.updates,
            progress=options.progress,
            tensorboard=options.tensorboard,
        )

    def fit(self, on_epoch: Callable[[int, Evaluation], None] | None) -> RunResult:
        result = None
        last = self.output / "last.pt"
        asked = threading.Event()
        with on_sigterm(asked.set):
            while self.epoch < self.recipe.epochs:
                started = time.perf_counter()
                if not self._train_epoch(asked):
                    self._save()
                    return RunResult(False, last, result)
                result = self._end_epoch(time.perf_counter() - started)
                if result is not None and on_epoch is not None:
                    on_epoch(self.epoch - 1, result)
        return RunResult(True, last, result)

    def _train_epoch(self, asked: threading.Event) -> bool:
        """The rest of the epoch; False when a stop was asked for."""
        options, batches = self.options, self.batches
        batches.epoch, batches.start = self.epoch, self.updates - self.epoch * batches.steps
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(self.epoch)
        self._train_mode()
        passes = iter(self.loader)
        while self.updates < (self.epoch + 1) * batches.steps:
            torch.manual_seed(mix(options.seed, self.updates, self.world.rank))
            self.schedule.step_update(self.updates)
            local = self._step(passes).tolist()
            self.updates += 1
            end = self.updates == (self.epoch + 1) * batches.steps
            report = end or self.updates % options.log_every == 0
            save = bool(options.save_every) and self.updates % options.save_every == 0 and not end
            *sums, stops = self.world.sum(*local, float(asked.is_set()))
            self.totals = [a + b for a, b in zip(self.totals, sums, strict=True)]
            if not math.isfinite(self.totals[0]):
                raise FloatingPointError(
                    f"the loss is {self.totals[0]} at step {self.updates} (learning rate {self._lr():.3g}): "
                    f"lower --lr, or use --amp off; {self.output / 'last.pt'} holds the state before, if any"
                )
            if report:
                self._report()
            else:
                self.log.advance(batches.batch_size)
            if stops:  # at the end of an epoch before its validation, which the resumed run then does
                return False
            if save:
                self._save()
        return True

    def _step(self, passes: Iterator[Any]) -> Tensor:
        """One optimiser step; this process's (summed loss, correct clips, clips)."""
        device, accumulate = self.world.device, self.options.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=device)  # MPS has no float64
        for part in range(accumulate):
            clips, target = next(passes)
            clips, target = clips.to(device, non_blocking=True), target.to(device, non_blocking=True)
            waits = self.world.size > 1 and part < accumulate - 1
            with self.parallel.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with self.autocast():
                    logits = self.network(clips)
                    loss = nn.functional.cross_entropy(logits.float(), target)
                self.scaler.scale(loss / accumulate).backward()
            correct = (logits.detach().argmax(dim=1) == target).sum()
            count = torch.full_like(correct, len(target))
            sums += torch.stack([loss.detach() * len(target), correct, count])
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates + 1)
        return sums

    def _report(self) -> None:
        """The means since the last report, to the log and the bar."""
        loss, correct, clips = (a - b for a, b in zip(self.totals, self.reported, strict=True))
        self.reported = list(self.totals)
        loss, top1 = loss / clips, 100.0 * correct / clips
        self.log.advance(self.batches.batch_size, loss=f"{loss:.4f}", top1=f"{top1:.1f}%")
        self.log.write(
            "step",
            self.updates,
            epoch=self.epoch,
            loss=loss,
            top1=top1,
            lr=self._lr(),
            clips_per_s=self.log.clips_per_s,
            seconds_left=self.log.seconds_left,
        )

    def _end_epoch(self, seconds: float) -> Evaluation | None:
        loss, correct, clips = self.totals
        values: dict[str, Any] = {
            "epoch": self.epoch,
            "train_loss": loss / clips,
            "train_top1": 100.0 * correct / clips,
            "seconds": seconds,
        }
        done = self.epoch + 1
        result = None
        if self.val_set is not None and (
            done % self.options.evaluate_every == 0 or done == self.recipe.epochs
        ):
            self._save()  # the epoch still open: after a kill the validation is done again, not the epoch
            self.world.copy_to_all(self._kept().buffers())  # each process has its own batch norms' statistics
            result = evaluate(
                self._kept(),
                self.val_set,
                self.config.labels,
                batch_size=max(1, self.batches.batch_size // (self.world.size * self.options.accumulate)),
                workers=self.options.workers,
                world=self.world,
            )
            values |= {"val_loss": result.loss, "val_top1": result.top1, "val_top5": result.top5}
        if result is not None and result.top1 > self.best:
            self.best = result.top1
            if self.world.main:
                save_checkpoint(self.output / "best.pt", self.config, self._kept().state_dict())
        self.log.write("epoch", self.updates, **values)
        self.epoch = done
        self.totals, self.reported = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        self._save()  # last: what the epoch leaves is there, or comes again
        return result

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _kept(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.model if self.ema is None else self.ema.module

    def _train_mode(self) -> None:
        self.model.train()
        freeze_batch_norm(self.model, self.recipe.batch_norm)

    def _save(self) -> None:
        if not self.world.main:
            return
        training = {
            "recipe": _plain(asdict(self.recipe)),
            "options": _plain(asdict(self.options)),
            "epoch": self.epoch,
            "updates": self.updates,
            "clips": self.batches.length,
            "best": self.best,
            "totals": self.totals,
            "reported": self.reported,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "model": None if self.ema is None else self.model.state_dict(),
        }
        save_checkpoint(self.output / "last.pt", self.config, self._kept().state_dict(), training)

    def _restore(self) -> None:
        path = self.output / "last.pt"
        content = self.world.share(read_checkpoint(path) if self.world.main else None)
        training = content.get("training")
        if training is None:
            raise CheckpointError(f"{path} holds no training state to go on from")
        now = {
            "model": self.config.to_dict(),
            "recipe": _plain(asdict(self.recipe)),
            "options": _plain(asdict(self.options)),
            "data": {"training clips": self.batches.length},
        }
        then = {
            "model": content["config"].to_dict(),
            "recipe": training["recipe"],
            "options": training["options"],
            "data": {"training clips": training.get("clips", self.batches.length)},  # not in older files
        }
        for part in now:
            changed = [
                f"{key} was {then[part].get(key)!r}, is {value!r}"
                for key, value in now[part].items()
                if key not in _NOT_COMPARED and then[part].get(key) != value
            ]
            if changed:
                raise CheckpointError(f"{path} is of another run ({part}): {'; '.join(changed)}")
        load_weights(self.model, training["model"] or content["state_dict"], path)
        if self.ema is not None:
            self.ema.module.load_state_dict(content["state_dict"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        self.epoch, self.updates, self.best = training["epoch"], training["updates"], training["best"]
        self.totals, self.reported = training["totals"], training["reported"]
        if self.world.main:
            truncate_log(self.output, self.updates, self.epoch)


def _check(options: RunOptions, recipe: Recipe, world: World) -> None:
    if options.amp not in AMP:
        raise ValueError(f"amp must be one of {', '.join(AMP)}, got {options.amp!r}")
    if not 0 <= options.ema < 1:
        raise ValueError(f"ema is a decay in [0, 1), got {options.ema}")
    for name in ("accumulate", "group", "log_every", "evaluate_every"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}")
    for name in ("save_every", "seed"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(options, name)}")
    if recipe.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {recipe.epochs}")
    if options.sync_bn and world.device.type != "cuda":
        raise ValueError("sync_bn needs CUDA: torch has no SyncBatchNorm for the CPU")


def _prepare(output: Path, resume: bool, world: World) -> bool:
    """Make and check the folder of the run; whether there is something to resume."""
    found = False
    if world.main:
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output):
                pass
        except OSError as error:
            raise CheckpointError(f"cannot write to {output}: {error.strerror or error}") from error
        found = (output / "last.pt").exists()
        if found and not resume:
            raise FileExistsError(
                f"{output} already holds a run: resume it (--resume) or take another folder"
            )
        for stale in output.glob(".*.pt.*.tmp"):  # of a run killed while it wrote
            stale.unlink(missing_ok=True)
        if not found:
            (output / "log.jsonl").unlink(missing_ok=True)
    return bool(world.share(found))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as a loaded checkpoint has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
