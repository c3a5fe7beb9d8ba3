"""`diffx jobs`: what has become of every arm."""

import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffx.experiment import Run, find_runs
from diffx.launch import Ledger
from diffx.launch.scheduler import Job, accounting, available, cancel, queue
from diffx.utils import DiffxError, nearest

OPTIONS = ("--resubmit", "--cancel", "--log", "--watch")
LINES = 20


@dataclass(frozen=True)
class State:
    """What has become of an arm.

    Arguments:
        run: its directory.
        name: `finished`, `running`, `evaluating`, `queued`, `interrupted`, `failed`, `cancelled`, `killed` or `waiting`
            (never started).
        step: the newest step known.
        steps: steps of the whole run.
        seconds: seconds left by the speed last logged; None where that says nothing.
        starts: how often it has been started.
        stops: how often it was stopped or killed.
        job: the newest job.
        reason: why it failed, or why it waits.
        log: where its output lies.
    """

    run: Run
    name: str
    step: int
    steps: int
    seconds: float | None
    starts: int
    stops: int
    job: str
    reason: str
    log: str

    @property
    def live(self) -> bool:
        """Whether something is being done about it."""
        return self.name in ("running", "evaluating", "queued")


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    options = {word for word in argv if word.startswith("-")}
    for word in options - set(OPTIONS):
        raise DiffxError(f"there is no option '{word}'{nearest(word, OPTIONS)}; diffx jobs has {', '.join(OPTIONS)}")
    settings = [word for word in argv if word.startswith("launcher.") and "=" in word]
    if settings and "--resubmit" not in options:
        raise DiffxError(f"'{settings[0]}' changes how arms are submitted; add --resubmit")
    paths = [word for word in argv if word not in options and word not in settings]
    runs = find_runs(*paths or ["runs"])
    if not runs:
        raise DiffxError(f"there are no runs in '{' '.join(paths) or 'runs'}'; diffx train starts some")
    console = Console()
    found = states(runs)
    if "--cancel" in options:
        return _cancel(found, console)
    if "--resubmit" in options:
        return _resubmit(found, settings)
    if "--watch" in options:
        from diffx.cli.submit import watch

        return watch(runs, console)
    console.print(table(found))
    if "--log" in options:
        for state in found:
            _print_log(state, console)
    return 0


def states(runs: Sequence[Run]) -> list[State]:
    """The state of each run, from what it says itself, its ledger, and what SLURM knows of its job."""
    jobs = {run: Ledger(run.path).job for run in runs}
    queued = queue(jobs.values())
    forgotten = {job for job in jobs.values() if job and (job not in queued or not queued[job].live)}
    remembered = accounting(forgotten)
    return [_state(run, job, queued.get(job) or remembered.get(job)) for run, job in jobs.items()]


def _state(run: Run, job: str, slurm: Job | None) -> State:
    status, config, ledger = run.status(), run.config(), Ledger(run.path)
    events, row = ledger.events(), run.latest()
    name, reason = _name_of(run, status, events, job, slurm)
    steps = config["training"]["max_steps"]
    step = steps if name in ("finished", "evaluating") else int(max(status.get("step", 0), row.get("step", 0)))
    speed = row.get("images_per_second", 0)
    left = (steps - step) * config["data"]["batch_size"] / speed if name == "running" and speed > 0 else None
    count = Counter(event["event"] for event in events)
    restarts = max((event.get("restarts", 0) for event in events), default=0)
    log = next((event["log"] for event in reversed(events) if event.get("log")), "")
    starts = max(count["started"], restarts + 1 if count["started"] else 0)
    return State(
        run, name, step, steps, left, starts, max(count["stopped"] + count["died"], restarts), job, reason, log
    )


def _name_of(
    run: Run, status: dict[str, Any], events: list[dict[str, Any]], job: str, slurm: Job | None
) -> tuple[str, str]:
    said = status.get("state", "waiting")
    if said in ("finished", "pruned"):
        return said, ""
    if slurm is not None and slurm.live:
        if slurm.state != "RUNNING":
            return "queued", slurm.reason
        return ("evaluating" if said == "evaluating" else "running"), ""
    if not job or (slurm is None and not available()):
        if run.locked:
            return ("evaluating" if said == "evaluating" else "running"), ""
        return ("killed" if said in ("running", "evaluating") else said), status.get("reason", "")
    last = events[-1] if events else {}
    if last.get("event") in ("failed", "cancelled"):
        return last["event"], last.get("reason", "")
    if slurm is not None and slurm.state != "COMPLETED":
        return ("cancelled" if slurm.state == "CANCELLED" else "failed"), f"SLURM says {slurm.state}"
    return ("interrupted" if said == "interrupted" else "killed"), last.get("reason", "its job has gone")


def table(found: Sequence[State]) -> Table:
    """The states as a table for the terminal."""
    count = Counter(state.name for state in found)
    # what all have in common stands above the table once
    paths = [state.run.path for state in found]
    root = os.path.commonpath([path.parents[1] for path in paths])
    title = ", ".join(f"{n} {name}" for name, n in count.most_common())
    shown = Table(title=title, caption=f"in {root}", title_justify="left", caption_justify="left")
    for name in ("run", "state", "step", "ETA", "starts", "job", "reason"):
        shown.add_column(name, justify="right" if name in ("step", "ETA", "starts") else "left", overflow="fold")
    for state, path in zip(found, paths, strict=True):
        cells = (
            os.path.relpath(path, root),
            f"[{_COLOURS.get(state.name, '')}]{state.name}[/]" if state.name in _COLOURS else state.name,
            f"{state.step:,}/{state.steps:,}",
            duration(state.seconds),
            str(state.starts or ""),
            state.job,
            escape(state.reason),
        )
        shown.add_row(*cells)
    return shown


_COLOURS = {"finished": "green", "running": "cyan", "evaluating": "cyan", "failed": "red", "killed": "red"}


def duration(seconds: float | None) -> str:
    """Seconds as `2 d 3 h`, `3 h 05 min`, `12 min` or `40 s`; empty for None."""
    if seconds is None:
        return ""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _cancel(found: Sequence[State], console: Console) -> int:
    live = [state for state in found if state.live and state.job]
    if not live:
        console.print("nothing is queued or running on SLURM", highlight=False)
        return 0
    for state in live:  # before SLURM is told: a job must not take the signal for a preemption
        Ledger(state.run.path).add("cancelled", job=state.job, reason="by diffx jobs --cancel")
    cancel(state.job for state in live)
    console.print(f"cancelled {len(live)} jobs; what they had saved stays, and --resubmit resumes it", highlight=False)
    return 0


def _resubmit(found: Sequence[State], settings: list[str]) -> int:
    from diffx.cli.submit import submit

    arms = []
    for state in found:
        if state.name in ("finished", "pruned") or state.live:
            continue
        config = state.run.config()
        if "nodes" not in config.get("launcher", {}):
            raise DiffxError(
                f"'{state.run.path}' was not started by launcher=slurm; give the folders of those that were, or repeat "
                "its command, which resumes it"
            )
        for word in settings:
            key, _, value = word.removeprefix("launcher.").partition("=")
            if key not in config["launcher"]:
                raise DiffxError(f"there is no key 'launcher.{key}'{nearest(key, config['launcher'])}")
            config["launcher"][key] = yaml.safe_load(value)
        arms.append((state.run, config))
    if not arms:
        Console().print("nothing to submit: every arm is finished, queued or running", highlight=False)
        return 0
    return submit(arms)


def _print_log(state: State, console: Console) -> None:
    console.rule(f"{state.run.path}  {state.log}", align="left")
    if state.log and os.path.isfile(state.log):  # noqa: PTH113
        with Path(state.log).open(encoding="utf-8", errors="replace") as file:
            console.print("".join(deque(file, LINES)).rstrip(), highlight=False, markup=False, soft_wrap=True)
