"""What happens beside training: the progress bar and the evaluation of the EMA."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffx.denoisers import Denoiser
from diffx.evaluation import Evaluator
from diffx.generate import Generator
from diffx.metrics import Value
from diffx.pictures import save_grid
from diffx.training.log import TrainingLog
from diffx.training.loggers import log_image
from diffx.training.module import DiffusionModule


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


class EvaluateEMA(L.Callback):
    """Every n steps: a sample grid and the metrics of the EMA, with the same initial noise each time.

    Touches neither the weights nor any random state: training goes on as if it had not happened.

    Arguments:
        every_n_steps: steps between evaluations; 0 for never.
        generator: makes a generator of a denoiser.
        evaluator: measures.
        total: samples per evaluation; 0 for pictures only.
        directory: where the grids go.
        per_class: samples of each class in the grid.
        console: where to print.
    """

    def __init__(
        self,
        every_n_steps: int,
        generator: Callable[[Denoiser], Generator],
        evaluator: Evaluator,
        total: int,
        directory: Path,
        per_class: int,
        console: Console,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.generator = generator
        self.evaluator = evaluator
        self.total = total
        self.directory = Path(directory)
        self.per_class = per_class
        self.console = console

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates where it is time; the end of training is left to the final evaluation."""
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0 and step < trainer.max_steps
        if due and not trainer.fit_loop._should_accumulate():
            assert isinstance(pl_module, DiffusionModule)
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, module: DiffusionModule) -> dict[str, Value]:
        """Evaluates now; all ranks call it."""
        started = time.perf_counter()
        generator = self.generator(module.ema.denoiser)
        step = trainer.global_step
        if trainer.is_global_zero:
            path = self.directory / f"step={step:08d}.png"
            save_grid(generator, path, self.per_class, module.device)
            log_image(trainer.loggers, "samples", path, step)
        if not self.total:
            return {}
        # the caller's no_grad and precision do not reach samples: they are made as diffx evaluate makes them
        with torch.autocast(module.device.type, enabled=False):
            values = self.evaluator(generator, self.total, module.device, trainer.global_rank, trainer.world_size)
        row = {f"eval/{name}": value.value for name, value in values.items()}
        row["eval/seconds"] = time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        if trainer.is_global_zero:
            text = "  ".join(str(value) for value in values.values())
            self.console.print(f"step {step}: EMA, {self.total} samples: {text}", highlight=False)
        return values
