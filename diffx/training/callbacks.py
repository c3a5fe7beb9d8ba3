"""What happens beside training: the progress bar and the evaluation of the EMA."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffx.denoisers import Denoiser
from diffx.evaluation import Evaluator, Interrupted
from diffx.generate import Generator
from diffx.metrics import Value
from diffx.pictures import save_grid
from diffx.training.log import TrainingLog
from diffx.training.loggers import log_image
from diffx.training.module import DiffusionModule
from diffx.training.weights import BestWeights
from diffx.utils import DiffxError, nearest, patiently
from diffx.utils.signals import StopSignal


class ProgressBar(L.Callback):
    """Steps, loss, images per second, time left. On a terminal a bar; in a log file a line now and then.

    Arguments:
        training_log: where loss and speed are read from.
        console: where to print.
        refresh_seconds: time between updates of the bar.
        line_seconds: time between lines where there is no terminal.
    """

    def __init__(
        self, training_log: TrainingLog, console: Console, refresh_seconds: float = 0.5, line_seconds: float = 30.0
    ) -> None:
        self.training_log = training_log
        self.console = console
        self.every = refresh_seconds if console.is_terminal else line_seconds
        self._next = 0.0
        self._bar: Progress | None = None
        self._started = (0.0, 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the bar."""
        self._started = (time.perf_counter(), trainer.global_step)
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            auto_refresh=False,
        )
        self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, text="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the bar when it is time, never the device: it shows what the log has already read."""
        now = time.perf_counter()
        if now < self._next or not trainer.is_global_zero:
            return
        self._next = now + self.every
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=self._text())
            self._bar.refresh()
        elif self.training_log.latest:
            started, first = self._started
            rate = (trainer.global_step - first) / (now - started)
            left = (trainer.max_steps - trainer.global_step) / rate if rate else float("nan")
            self.console.print(
                f"step {trainer.global_step}/{trainer.max_steps}  {self._text()}  ETA {left:.0f} s", highlight=False
            )

    def _text(self) -> str:
        latest = self.training_log.latest
        return f"loss {latest['loss']:.4f}  {latest['images_per_second']:,.0f} img/s" if latest else ""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the last state and closes the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=self._text())
            self._bar.refresh()
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message stands below it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


Report = Callable[[int, Mapping[str, float]], bool]
"""Is told a step and its metrics, and says whether to stop there."""


@dataclass(frozen=True)
class Point:
    """One way to sample the model while it trains.

    Arguments:
        name: what its values are logged under, `eval/<name>/<metric>`; empty for the settings of the run.
        weights: which EMA, as `ema` or `ema_0.99`.
        generator: makes a generator of a denoiser.
    """

    name: str
    weights: str
    generator: Callable[[Denoiser], Generator]


class EvaluateEMA(L.Callback):
    """Every n steps: a sample grid and the metrics of the EMA, with the same initial noise each time.

    Touches neither the weights nor any random state: training goes on as if it had not happened.

    Arguments:
        every_n_steps: steps between evaluations; 0 for never.
        points: how to sample; the first one makes the grid, and decides which weights are the best.
        evaluator: measures.
        total: samples per evaluation and point; 0 for pictures only.
        directory: where the grids go.
        per_class: samples of each class in the grid.
        console: where to print.
        best: keeps the best weights; None for not.
        asked: the signals that ask to stop, so that a long evaluation is no longer than the grace time.
        report: called with the step and the metrics of the first point; if it returns True, training stops there.

    Attributes:
        pruned: whether `report` has stopped the training.
    """

    def __init__(
        self,
        every_n_steps: int,
        points: Sequence[Point],
        evaluator: Evaluator,
        total: int,
        directory: Path,
        per_class: int,
        console: Console,
        best: BestWeights | None = None,
        asked: StopSignal | None = None,
        report: Report | None = None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.points = points
        self.evaluator = evaluator
        self.total = total
        self.directory = Path(directory)
        self.per_class = per_class
        self.console = console
        self.best = best
        self.asked = StopSignal() if asked is None else asked
        self.report = report
        self.pruned = False
        self._evaluated = 0

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint: the step last evaluated."""
        return {"evaluated": self._evaluated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The step last evaluated."""
        self._evaluated = state_dict["evaluated"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes up the evaluation in which an earlier process was stopped."""
        self._evaluate_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates where it is time; the end of training is left to the final evaluation."""
        if not trainer.fit_loop._should_accumulate():
            self._evaluate_if_due(trainer, pl_module)

    def _evaluate_if_due(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0 and step < trainer.max_steps
        if not due or self._evaluated >= step:
            return
        assert isinstance(module, DiffusionModule)
        started = time.perf_counter()
        try:
            self.evaluate(trainer, module)
        except Interrupted as interrupted:
            # the checkpoint of this step will say that the evaluation is still to be made; the sums so far are kept
            trainer.should_stop = True
            self.asked.number = interrupted.signal  # on the ranks that were not asked too
        else:
            self._evaluated = step
            trainer.should_stop = trainer.should_stop or self.pruned
        callbacks: list[L.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        for log in callbacks:
            if isinstance(log, TrainingLog):
                log.leave_out(time.perf_counter() - started)

    def evaluate(self, trainer: L.Trainer, module: DiffusionModule) -> None:
        """Evaluates now; all ranks call it.

        Raises:
            Interrupted: if a signal asks to stop.
            DiffxError: if the metric that decides on the best weights is not among those measured.
        """
        started, step = time.perf_counter(), trainer.global_step
        averages, row, lines = module.ema.named(), {}, []
        if trainer.is_global_zero:
            path = self.directory / f"step={step:08d}.png"
            generator = self.points[0].generator(averages[self.points[0].weights])
            patiently(lambda: save_grid(generator, path, self.per_class, module.device))
            log_image(trainer.loggers, "samples", path, step)
        partial = [self.directory / f".step={step:08d}-{k}.partial.safetensors" for k in range(len(self.points))]
        for point, snapshot in zip(self.points, partial, strict=True) if self.total else ():
            # the caller's no_grad and precision do not reach samples: they are made as diffx evaluate makes them
            with torch.autocast(module.device.type, enabled=False):
                values = self.evaluator(
                    point.generator(averages[point.weights]),
                    self.total,
                    module.device,
                    trainer.global_rank,
                    trainer.world_size,
                    snapshot=snapshot,
                    stop=lambda: self.asked.number or 0,
                ).values
            under = f"eval/{point.name}/" if point.name else "eval/"
            row |= {f"{under}{name}": value.value for name, value in values.items()}
            lines.append("  ".join([point.name or "EMA", *(str(value) for value in values.values())]))
            if point is self.points[0] and self.best is not None:
                self._keep_best(values, averages[point.weights], step, trainer.is_global_zero)
            if point is self.points[0] and self.report is not None:
                self.pruned = self.report(step, {name: value.value for name, value in values.items()})
        if not row:
            return
        row["eval/seconds"] = time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        for line in lines:
            self.console.print(f"step {step}, {self.total} samples: {line}", highlight=False)
        for snapshot in partial if trainer.is_global_zero else ():
            snapshot.unlink(missing_ok=True)

    def _keep_best(self, values: dict[str, Value], denoiser: torch.nn.Module, step: int, writes: bool) -> None:
        assert self.best is not None
        if self.best.monitor not in values:
            raise DiffxError(
                f"checkpoint.monitor={self.best.monitor} is not measured{nearest(self.best.monitor, values)}; "
                f"choose one of {', '.join(values)}"
            )
        if writes:
            self.best.offer(values[self.best.monitor].value, denoiser, step)
