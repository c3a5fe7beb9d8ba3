"""TensorBoard, by Lightning's logger."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from diffx.evaluation import Evaluation
from diffx.training.loggers.tracker import COLUMNS, About, Tracker, needs, rows_of


class TensorBoardTracker(Tracker):
    """Event files in the folder `tensorboard` of the run directory; a resumed run adds one to those of before.

    Arguments:
        about: the run.
    """

    def __init__(self, about: About) -> None:
        needs("tensorboard", "tensorboard")
        self.about = about
        self._logger: Any = None

    def start(self) -> None:
        """Opens an event file; what was logged beyond the checkpoint of a resumed run no longer counts."""
        from lightning.pytorch.loggers import TensorBoardLogger

        about = self.about
        self._logger = TensorBoardLogger(
            about.directory,
            name="tensorboard",
            version="",
            default_hp_metric=False,
            purge_step=about.step + 1 if about.step else None,
        )
        if not about.step:
            shown = {"run": about.name, **about.facts, "launch": dict(about.launch), "config": dict(about.config)}
            text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    @property
    def _writer(self) -> Any:
        return self._logger.experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """A scalar each, written at once: a killed run keeps what its CSV keeps."""
        self._logger.log_metrics(dict(metrics), step=step)
        self._writer.flush()

    def log_picture(self, key: str, picture: Path, step: int) -> None:
        """A picture."""
        with Image.open(picture) as image:
            self._writer.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def log_evaluation(self, name: str, evaluation: Evaluation, step: int) -> None:
        """A table of text; the values are scalars already."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows_of(evaluation)]
        cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
        self._writer.add_text(f"{name}/evaluation", "\n".join(f"| {' | '.join(line)} |" for line in cells), step)

    def log_files(self, files: Sequence[Path], step: int) -> None:
        """Nothing: TensorBoard keeps no files."""

    def finish(self, code: int) -> None:
        """Closes the event file."""
        self._writer.close()
