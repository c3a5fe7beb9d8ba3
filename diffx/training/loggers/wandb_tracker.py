"""Weights & Biases."""

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from diffx.evaluation import Evaluation
from diffx.training.loggers.tracker import COLUMNS, About, Tracker, needs, rows_of

STEP = "trainer/global_step"
"""The step axis of all that is logged."""

PACKAGE = Path(__file__).parents[2]


class WandbTracker(Tracker):
    """A run of Weights & Biases with an id that survives a requeue.

    Written offline where there is no key, or where W&B cannot be reached when the run starts; `diffx wandb sync`
    uploads that later.

    Arguments:
        about: the run.
        project: the project.
        entity: the team or user; the account's default if None.
        tags: further tags.
        log_model: keep the inference weights as an artifact; `all` keeps the newest training checkpoint too.
        log_code: keep the code of diffx as an artifact.
        timeout: seconds that W&B may take to open a run, and to take the rest at its end; what it has not taken then
            stays on the disk.
    """

    def __init__(
        self,
        about: About,
        project: str = "diffx",
        entity: str | None = None,
        tags: list[str] | None = None,
        log_model: bool | Literal["all"] = False,
        log_code: bool = False,
        timeout: float = 30.0,
    ) -> None:
        needs("wandb", "wandb")
        self.about = about
        self.project = project
        self.entity = entity
        self.tags = tags or []
        self.log_model = log_model
        self.log_code = log_code
        self.timeout = timeout
        self._run: Any = None
        self._staging = False
        self._defined: set[str] = set()
        self._first = 0  # the first step that W&B takes

    def start(self) -> None:
        """Opens the run, or goes on in it; never asks for a key."""
        mode, why = _mode()
        try:
            self._run = self._open(mode)
        except Exception as error:  # W&B has a dozen ways to be away
            if mode == "offline":
                raise
            why = f"W&B does not open the run ({' '.join(str(error).split())[:200]})"
            _give_up()
            self._run = self._open("offline")
        if why:
            folder = self.about.directory
            print(
                f"{why}: it is written offline; diffx wandb sync '{folder}' uploads it later",
                file=sys.stderr,
                flush=True,
            )
        self._first = self._run.step
        self._run.define_metric(STEP, hidden=True)
        self._run.summary.update(dict(self.about.facts))
        if patch := _file(self.about.directory / "diff.patch"):
            self._run.save(patch, base_path=self.about.directory, policy="now")
        if self.log_code:
            self._run.log_code(str(PACKAGE), include_fn=lambda path: path.endswith((".py", ".yaml")))

    def _open(self, mode: str) -> Any:
        import wandb  # slow to import

        about = self.about
        folder = about.directory / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        # what is to be uploaded lies with the run, not in the user's home
        self._staging = os.environ.get("WANDB_DATA_DIR") is None
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve()))
        os.environ.setdefault("WANDB_SILENT", "true")
        return wandb.init(
            project=self.project,
            entity=self.entity,
            id=about.run_id,
            group=about.group,
            job_type=about.job,
            name=about.name,
            # longer ones are refused
            tags=[tag[:64] for tag in dict.fromkeys([*about.tags, *self.tags])],
            config={**about.config, "launch": dict(about.launch)},
            dir=about.directory,
            resume="allow",
            reinit="finish_previous",
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(
                init_timeout=self.timeout,
                finish_timeout=self.timeout,
                finish_timeout_raises=True,
            ),
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """A row of the history, queued for W&B's own process."""
        for name in metrics:
            self._define(name)
        self._log(metrics, step)

    def _log(self, row: Mapping[str, Any], step: int) -> None:
        """Puts a row at its training step, so that a resumed run goes on behind the one before it.

        What W&B has been told of already, it is told at the first step that it takes: it would drop it otherwise.
        """
        self._run.log({**row, STEP: step}, step=max(step, self._first))

    def _define(self, name: str) -> None:
        """Declares a metric's axis, and what of it the table of runs is sorted by."""
        if name in self._defined:
            return
        self._defined.add(name)
        summary = None  # the last value, under the metric's own name
        if name.startswith("eval/"):
            summary = "min,max,last"
        elif name == "loss" or name.startswith("loss/"):
            summary = "min,last"
        # a dot would stand for a nested key
        self._run.define_metric(name.replace(".", "\\."), step_metric=STEP, summary=summary)

    def log_picture(self, key: str, picture: Path, step: int) -> None:
        """A picture of the history."""
        import wandb

        self._define_media(key)
        self._log({key: wandb.Image(str(picture))}, step)

    def log_evaluation(self, name: str, evaluation: Evaluation, step: int) -> None:
        """A table of the history; values, standard errors and the protocol's hash in the summary."""
        import wandb

        found: dict[str, Any] = {f"{name}/protocol": evaluation.fingerprint}
        for metric, value in evaluation.values.items():
            found[f"{name}/{metric}"] = value.value
            if value.stderr is not None:
                found[f"{name}/{metric}_stderr"] = value.stderr
        self._run.summary.update(found)
        key = f"{name}/evaluation"
        self._define_media(key)
        rows: list[Any] = rows_of(evaluation)
        self._log({key: wandb.Table(columns=list(COLUMNS), data=rows)}, step)

    def _define_media(self, key: str) -> None:
        if key not in self._defined:
            self._defined.add(key)
            self._run.define_metric(key, step_metric=STEP)

    def log_files(self, files: Sequence[Path], step: int) -> None:
        """An artifact `model-<run id>`; training checkpoints in it with `log_model=all` only."""
        import wandb

        kept = [file for file in files if self.log_model == "all" or file.suffix != ".ckpt"]
        if not self.log_model or not kept:
            return
        artifact = wandb.Artifact(f"model-{self.about.run_id}", "model", metadata={"step": step, **self.about.facts})
        for file in kept:
            artifact.add_file(str(file), policy="immutable", skip_cache=True)  # not copied
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def finish(self, code: int) -> None:
        """Closes the run; one that a signal has interrupted is marked as preempted."""
        if code >= 128:
            self._run.mark_preempting()
        try:
            self._run.finish(exit_code=code)
        except TimeoutError as error:
            folder = self.about.directory
            raise TimeoutError(
                f"it has not taken the rest in {self.timeout:g} s; diffx wandb sync --all '{folder}' uploads it"
            ) from error
        finally:
            if self._staging:
                del os.environ["WANDB_DATA_DIR"]


def _give_up() -> None:
    """Ends W&B's own process, which would go on trying to open the run."""
    import wandb

    wandb.teardown()


def _file(path: Path) -> str:
    return str(path) if path.is_file() else ""


def _mode() -> tuple[str, str]:
    """W&B's mode, and why it is offline where somebody would wonder."""
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun", "disabled"):
        return {"dryrun": "offline"}.get(asked, asked), ""
    if not has_key():
        return "offline", "there is no key for W&B (wandb login)"
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not reachable(url):
        return "offline", f"W&B cannot be reached at {url}"
    return "online", ""


def reachable(url: str, timeout: float = 5.0) -> bool:
    """Whether anything answers at a URL, proxies of the environment considered.

    Arguments:
        url: an `http` or `https` URL.
        timeout: seconds to wait for it.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B's own process may know the certificate
    except (OSError, ValueError):
        return False


def has_key() -> bool:
    """Whether W&B can log in without asking: by its environment variable or `~/.netrc`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc or "wandb"
    return netrc.is_file() and host in netrc.read_text(encoding="utf-8", errors="replace")
