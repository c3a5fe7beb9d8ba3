"""MLflow, by Lightning's logger."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from diffx.evaluation import Evaluation
from diffx.training.loggers.tracker import COLUMNS, About, Tracker, needs, rows_of


class MLflowTracker(Tracker):
    """A run of MLflow, in a database of its own in the run directory, or on a server.

    Arguments:
        about: the run.
        experiment: the name of MLflow's experiment.
        tracking_uri: the server or database, such as `sqlite:///runs/mlflow.db`; None for `mlflow/mlflow.db` in the run
            directory.
        log_model: keep the inference weights as artifacts; `all` keeps the newest training checkpoint too.
    """

    def __init__(
        self,
        about: About,
        experiment: str = "diffx",
        tracking_uri: str | None = None,
        log_model: bool | Literal["all"] = False,
    ) -> None:
        needs("mlflow", "mlflow")
        if tracking_uri is None:
            needs("sqlalchemy", "mlflow")
        self.about = about
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.log_model = log_model
        self._logger: Any = None
        self._last: dict[str, int] = {}  # the last step of each metric that a resumed run has

    def start(self) -> None:
        """Opens the run, or goes on in the one of the same id."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401 (sets its own log levels)
        from lightning.pytorch.loggers import MLFlowLogger

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)

        folder = (self.about.directory / "mlflow").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        local = self.tracking_uri is None
        settings: dict[str, Any] = {
            "experiment_name": self.experiment,
            "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}" if local else self.tracking_uri,
            "artifact_location": (folder / "artifacts").as_uri() if local else None,
        }
        found = _find(settings["tracking_uri"], self.experiment, self.about.run_id)
        about = self.about
        self._logger = MLFlowLogger(**settings, run_name=about.name, run_id=found, tags=_tags(about), synchronous=False)
        before = os.environ.get("MLFLOW_TRACKING_URI")
        _ = self._client
        # it is exported, and the next arm of a sweep would write there
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
        if found is None:
            self._logger.log_hyperparams({**about.config})
            for name, value in about.facts.items():
                self._client.log_metric(self._id, name, value, step=0)
            text = yaml.safe_dump(dict(about.config), sort_keys=False, allow_unicode=True)
            self._client.log_text(self._id, text, "config.yaml")
        else:
            self._client.update_run(found, status="RUNNING")
            self._last = {
                name: max(point.step for point in self._client.get_metric_history(found, name))
                for name in self._client.get_run(found).data.metrics
            }

    @property
    def _client(self) -> Any:
        return self._logger.experiment

    @property
    def _id(self) -> str:
        return self._logger.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """A point each, queued for a thread; what a resumed run repeats is there already."""
        new = {_name(name): value for name, value in metrics.items() if self._last.get(_name(name), -1) < step}
        self._logger.log_metrics(new, step=step)

    def log_picture(self, key: str, picture: Path, step: int) -> None:
        """A picture with its step."""
        with Image.open(picture) as image:
            self._client.log_image(self._id, image.convert("RGB"), key=_name(key), step=step)

    def log_evaluation(self, name: str, evaluation: Evaluation, step: int) -> None:
        """A table as an artifact."""
        columns = dict(zip(COLUMNS, map(list, zip(*rows_of(evaluation), strict=True)), strict=True))
        self._client.log_table(self._id, columns, f"{_name(name)}.json")
        self._client.set_tag(self._id, f"diffx.{_name(name)}.protocol", evaluation.fingerprint)

    def log_files(self, files: Sequence[Path], step: int) -> None:
        """Artifacts in `model`; training checkpoints with `log_model=all` only."""
        for file in files if self.log_model else ():
            if self.log_model == "all" or file.suffix != ".ckpt":
                self._client.log_artifact(self._id, str(file), f"model/step={step:08d}")

    def finish(self, code: int) -> None:
        """Writes what is queued, and says how the run ended."""
        import mlflow

        mlflow.flush_async_logging()
        status = "FINISHED" if code == 0 else "KILLED" if code >= 128 else "FAILED"
        self._client.set_terminated(self._id, status)


_ENVIRONMENT = {
    # a server that is away is given up after seconds, not minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def _find(tracking_uri: str, experiment: str, run_id: str) -> str | None:
    """MLflow's own id of a run, None if it knows none."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return None
    runs = client.search_runs([known.experiment_id], f"tags.`diffx.run` = '{run_id}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _tags(about: About) -> dict[str, str]:
    tags = {"diffx.run": about.run_id, "diffx.group": about.group, "diffx.job": about.job}
    for tag in about.tags:
        key, _, value = tag.partition("=")
        tags[_name(key)] = value
    if commit := about.launch.get("commit"):
        tags["mlflow.source.git.commit"] = str(commit)
    return tags


def _name(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w/. -]", "_", name.replace("<", " below ").replace(">", " above "))
