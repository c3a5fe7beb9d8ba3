"""A workspace of Weights & Biases for a sweep, by the objects of its own library."""

import json
import os
from dataclasses import dataclass
from typing import Any

from diffx.experiment import Collection, read_runs
from diffx.training.loggers.tracker import needs
from diffx.training.loggers.wandb_tracker import STEP
from diffx.utils import DiffxError


@dataclass(frozen=True)
class View:
    """A workspace.

    Arguments:
        workspace: wandb_workspaces' own object.
    """

    workspace: Any

    def text(self) -> str:
        """Its definition as JSON: what W&B is sent, under `spec`."""
        model = self.workspace._to_model()
        spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
        about = {"entity": model.entity, "project": model.project, "name": model.display_name}
        return json.dumps({**about, "spec": spec}, indent=1) + "\n"

    def save(self) -> str:
        """Saves it in W&B and returns its address.

        Raises:
            DiffxError: if W&B refuses it.
        """
        try:
            return self.workspace.save().url
        except Exception as error:  # whatever its client comes up with
            reason = " ".join(str(error).split())[:300]
            raise DiffxError(
                f"W&B does not take the workspace ({reason}); give entity=TEAM and project=NAME"
            ) from error


def workspace_of(places: list[str], project: str | None, entity: str | None) -> View:
    """The workspace for the runs below some folders: results by what differs, curves, noise levels, samples, speed.

    Arguments:
        places: the folders.
        project: W&B's project; that of the runs if None.
        entity: its team or user; that of the runs if None.

    Raises:
        DiffxError: if wandb-workspaces is not installed, or there are no runs.
    """
    needs("wandb_workspaces", "workspaces")
    runs = read_runs(*places)
    settings = next((m.config["logger"]["wandb"] for m in runs.members if "wandb" in m.config.get("logger", {})), {})
    import wandb_workspaces.workspaces as ws

    axes = [_config_key(runs, axis) for axis in runs.axes]
    finals = _finals(runs)
    names = sorted({member.config["name"] for member in runs.members})
    pinned = [f"config:{axis}.value" for axis in axes] + [f"summary:final/{name}" for name in finals]
    shown = ws.RunsetSettings(
        filters=[ws.Config("name").isin(names)],
        # the seeds of an arm become one line
        groupby=[ws.Config(axis) for axis in axes] or [ws.Metric("Group")],
        pinned_columns=pinned,
    )
    if finals:
        shown.order = [ws.Ordering(ws.Summary(f"final/{finals[0]}"), ascending=True)]
    workspace = ws.Workspace(
        entity=entity or settings.get("entity") or os.environ.get("WANDB_ENTITY", ""),
        project=project or settings.get("project") or os.environ.get("WANDB_PROJECT", "diffx"),
        name=f"diffx {' '.join(names)}"[:60],
        sections=_sections(runs, axes, finals),
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=min(max(len(runs), 10), 100)),
        runset_settings=shown,
    )
    return View(workspace)


def _sections(runs: Collection, axes: list[str], finals: list[str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import ParallelCoordinatesPlotColumn as Column

    columns = [] if runs.history.empty else sorted(runs.history.columns)
    evals = [name for name in columns if name.startswith("eval/") and name != "eval/seconds"]
    levels = [name for name in columns if name.startswith("loss/logsnr")]
    costs = [name for name in ("images", "flops", "device_seconds") if name in columns]
    speed = [name for name in ("images_per_second", "data_wait", "grad_norm", "lr") if name in columns]

    def line(name: str, x: str = STEP) -> Any:
        return wr.LinePlot(title=f"{name} over {x.rpartition('/')[2]}", x=x, y=[name])

    results: list[Any] = [
        wr.BarPlot(title=name, metrics=[f"final/{name}"], groupby="Group", groupby_aggfunc="mean") for name in finals
    ]
    if finals and axes:
        target = Column(wr.SummaryMetric(f"final/{finals[0]}"))
        results.append(
            wr.ParallelCoordinatesPlot(
                title=f"{finals[0]} by what differs",
                columns=[*(Column(wr.Config(axis)) for axis in axes), target],
            )
        )
    contents = {
        "Results": results,
        "Metrics in training": [line(name) for name in evals] + [line(n, x) for x in costs for n in evals],
        "Loss": [line("loss")] if "loss" in columns else [],
        "Loss by noise level": [line(name) for name in levels],
        "Samples": [wr.MediaBrowser(title="samples", media_keys=["samples"], num_columns=4)],
        "Speed": [line(name) for name in speed],
        "What differs": [wr.RunComparer(diff_only="split")],
    }
    return [ws.Section(name=name, panels=panels, is_open=True) for name, panels in contents.items() if panels]


def _config_key(runs: Collection, axis: str) -> str:
    """Where W&B has an axis in a run's config."""
    return f"choices.{axis}" if any(axis in member.config.get("choices", {}) for member in runs.members) else axis


def _finals(runs: Collection) -> list[str]:
    """The metrics of the evaluations, baselines of theirs left out; Fréchet distances first."""
    names = {name for _, measurement in runs.measurements for name in measurement.evaluation.values}
    kept = [name for name in names if not name.endswith(("_floor", "_noise", "_heldout", "nfe"))]
    return sorted(kept, key=lambda name: (not name.startswith(("fid", "fd_")), name))
