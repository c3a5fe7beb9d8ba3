"""What trackers are told is what `metrics.csv` holds; they go on where a run goes on; none of them can stop a run."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import struct
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from diffx.cli import wandb as wandb_cli
from diffx.cli.budget import set_steps
from diffx.cli.build import build
from diffx.cli.compose import compose_config
from diffx.cli.execute import execute
from diffx.cli.tracking import about_of
from diffx.cli.wandb import main as wandb_command
from diffx.evaluation import Evaluation
from diffx.experiment import Record, fingerprint, identity, locate
from diffx.training import loggers
from diffx.training.loggers import (
    About,
    CSVLogger,
    MLflowTracker,
    TensorBoardTracker,
    Tracked,
    Tracker,
    WandbTracker,
    has_key,
)
from diffx.training.loggers.tracker import COLUMNS, rows_of
from diffx.utils import DiffxError
from diffx.utils.signals import SIGNALS

torch.set_num_threads(1)

TINY = [
    "backbone=unet_tiny",
    "trainer=cpu",
    "training.max_steps=6",
    "data.batch_size=8",
    "evaluation.every_n_steps=3",
    "evaluation.interim_samples=8",
    "evaluation.num_samples=20",
    "evaluation.per_class=1",
    "metrics=[fd]",
    "sampler.steps=2",
    "checkpoint.every_n_steps=2",
    "log_every_n_steps=1",
    "progress_bar=false",
]
NO_EVALUATION = ["evaluation.every_n_steps=0", "evaluation.num_samples=0", "extractor=none", "training.max_steps=3"]
KEY = "0123456789abcdef0123456789abcdef01234567"
AWAY = "http://127.0.0.1:9"
NUMBER = re.compile(r"-?[\d.]+(e[+-]?\d+)?$")


@pytest.fixture(scope="module", autouse=True)
def _surroundings(tmp_path_factory):
    """No account, no service, no question; the handlers of before afterwards."""
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
            patch.delenv(name)
        for name in ("WANDB_SILENT", "WANDB_DATA_DIR"):  # so that what is set in a test does not outlive it
            patch.setenv(name, "")
            patch.delenv(name)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setenv("NETRC", str(home / ".netrc"))
        patch.setattr("builtins.input", _never)
        yield
    for number, handler in handlers:
        signal.signal(number, handler)


def _never(*args):
    raise AssertionError("a question was asked")


def composed(root, *overrides):
    words = [*TINY, f"runs_dir={root}", *overrides]
    return compose_config("train", words, [], set_steps), words


def trained(root, *overrides, stop_after=None):
    """The run of one training in this process, and its exit code; SIGTERM comes after so many steps."""
    config, words = composed(root, *overrides)
    config["evaluation"] |= {"interim_points": {}, "final_points": {}}
    arm, run = build(config), locate(root, config, words)
    run.freeze(config)
    Record.now(["diffx", "train", *overrides]).append_to(run.path)
    count = 0

    def hook(outputs, batch, batch_idx):
        nonlocal count
        count += 1
        if count == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    arm.module.on_train_batch_end = hook
    return run, execute(arm, run, Console(file=io.StringIO()), run.resume_from())


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with every logger, stopped after four steps and resumed."""
    root = tmp_path_factory.mktemp("tracked")
    words = ["logger=[csv,wandb,tensorboard,mlflow]", "logger.wandb.log_model=all", "logger.wandb.tags=[mine]"]
    words += ["logger.mlflow.log_model=true"]
    run, code = trained(root, *words, stop_after=4)
    assert code == 128 + signal.SIGTERM and run.state == "interrupted"
    run, code = trained(root, *words)
    assert code == 0 and run.state == "finished"
    settle()
    return run


def settle():
    """Ends W&B's process, which writes on after a run, and whose settings are those of the first one."""
    import wandb

    wandb.teardown()


def csv_values(run):
    """{metric: {step: value}} of metrics.csv."""
    found = defaultdict(dict)
    for row in CSVLogger(run.path / "metrics.csv").rows():
        for name, value in row.items():
            if name != "step" and value != "":
                found[name][int(row["step"])] = float(value)
    assert {"loss", "eval/fd_digits", "final/fd_digits", "images_per_second"} <= found.keys()
    assert list(found["loss"]) == [1, 2, 3, 4, 5, 6]
    return dict(found)


def final(run):
    (file,) = run.evaluations.glob("*.json")
    return Evaluation.load(file)


# ---- choosing them ----


@pytest.mark.parametrize(
    ("choice", "keys"),
    [
        ("csv", []),
        ("wandb", ["wandb"]),
        ("tensorboard", ["tensorboard"]),
        ("mlflow", ["mlflow"]),
        ("[wandb,tensorboard]", ["tensorboard", "wandb"]),
        ("[csv,wandb,tensorboard,mlflow]", ["mlflow", "tensorboard", "wandb"]),
    ],
)
def test_one_or_several_are_chosen_and_are_no_part_of_the_experiment(tmp_path, choice, keys):
    config, _ = composed(tmp_path, f"logger={choice}")
    assert sorted(config["logger"]) == keys
    assert fingerprint(identity(config)) == fingerprint(identity(composed(tmp_path)[0]))


def test_an_unknown_one_is_told(tmp_path):
    with pytest.raises(DiffxError, match=r"there is no logger=comet; choose csv, mlflow, tensorboard or wandb"):
        composed(tmp_path, "logger=comet")


@pytest.mark.parametrize(
    ("tracker", "package", "extra"),
    [(TensorBoardTracker, "tensorboard", "tensorboard"), (MLflowTracker, "sqlalchemy", "mlflow")],
)
def test_a_missing_library_is_one_sentence_with_the_extra(tmp_path, monkeypatch, tracker, package, extra):
    monkeypatch.setattr("diffx.training.loggers.tracker.find_spec", lambda name: None if name == package else object())
    about = About(tmp_path, "id", "group", "name")
    with pytest.raises(DiffxError, match=rf"needs the package {package}; install it: pip install 'diffx\[{extra}\]'"):
        tracker(about)


def test_their_libraries_are_not_imported_before_they_are_chosen():
    heavy = re.compile(
        r"(from|import) (wandb|mlflow|tensorboard|wandb_workspaces|lightning\.pytorch\.loggers import \w+L)"
    )
    cli = Path(wandb_cli.__file__).parent
    files = [
        *Path(loggers.__file__).parent.glob("*.py"),
        *cli.glob("wandb*.py"),
        cli / "tracking.py",
        cli / "execute.py",
    ]
    lines = [(file, line) for file in files for line in file.read_text().splitlines()]
    assert not [(file, line) for file, line in lines if heavy.match(line)]
    assert len([line for _, line in lines if heavy.match(line.strip())]) > 5  # they are, within functions


def test_the_id_is_of_the_experiment_and_its_seed(tmp_path):
    def about(*overrides):
        config, words = composed(tmp_path, *overrides)
        return about_of(config, locate(tmp_path, config, words), 0, {})

    first = about("schedule=linear")
    again = about("schedule=linear", "sampler=heun", "logger=wandb", "trainer.devices=2", "checkpoint.keep_last=1")
    other = about("schedule=linear", "seed=3")
    assert first.run_id == again.run_id == f"{first.group}-seed0"
    assert other.group == first.group and other.run_id == f"{first.group}-seed3"
    assert about("schedule=cosine").group != first.group
    assert {"digits", "schedule=linear", "training.max_steps=6"} <= set(first.tags)


# ---- Weights & Biases, offline ----


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.fixture(scope="module")
def records(tracked):
    """The records of both parts of the run, in their order."""
    folders = sorted((tracked.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    return [[record for file in folder.glob("*.wandb") for record in wandb_records(file)] for folder in folders]


def items(pairs):
    return {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in pairs}


def history(parts):
    return [items(r.history.item) for part in parts for r in part if r.HasField("history")]


def assert_as_csv(rows, run):
    """Rows of a W&B history tell what the CSV tells, each step once."""
    told = defaultdict(dict)
    for row in rows:
        assert row["_step"] == row["trainer/global_step"]
        for name, value in row.items():
            if not name.startswith("_") and name != "trainer/global_step" and isinstance(value, int | float):
                told[name][int(row["trainer/global_step"])] = value
    assert [int(row["_step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    media = ("samples/", "progress/", "final/evaluation/")
    assert {name: values for name, values in told.items() if not name.startswith(media)} == csv_values(run)


def test_wandb_has_what_the_csv_has(tracked, records):
    assert_as_csv(history(records), tracked)


def test_wandb_has_the_pictures(tracked, records):
    logged = {key: [r["_step"] for r in history(records) if f"{key}/path" in r] for key in ("samples", "progress")}
    assert logged == {"samples": [3, 6], "progress": [6]}
    written = {file.read_bytes() for file in (tracked.path / "wandb").glob("offline-run-*/files/media/images/*.png")}
    names = ("step=00000003.png", "final.png", "progress.png")
    assert {(tracked.samples / name).read_bytes() for name in names} <= written


def test_wandb_has_the_identity_the_config_and_the_commit(tracked, records):
    digest = tracked.path.parent.name.rpartition("-")[2]
    for part in records:
        (run,) = (r.run for r in part if r.HasField("run"))
        assert run.run_id == f"{digest}-seed0" and run.run_group == digest and run.job_type == "train"
        assert {"digits", "backbone=unet_tiny", "training.max_steps=6", "mine"} <= set(run.tags)
        config = items(run.config.update)
        assert config.items() >= {key: tracked.config()[key] for key in ("schedule", "seed", "choices")}.items()
        launch = json.loads((tracked.path / "launches.jsonl").read_text().splitlines()[0])
        assert config["launch"]["commit"] == launch["commit"] and config["launch"]["packages"] == launch["packages"]
    exits = [r.exit.exit_code for part in records for r in part if r.HasField("exit")]
    assert exits == [143, 0]
    assert any(r.HasField("preempting") for r in records[0]) and not any(r.HasField("preempting") for r in records[1])


def test_wandb_metrics_have_their_axis_and_sort_well(tracked, records):
    metrics = {r.metric.name.replace("\\", ""): r.metric for part in records for r in part if r.HasField("metric")}
    for name in (*csv_values(tracked), "samples", "final/evaluation"):
        assert metrics[name].step_metric == "trainer/global_step", name
    assert metrics["loss"].summary.min and not metrics["lr"].summary.min
    assert metrics["eval/fd_digits"].summary.min and metrics["eval/fd_digits"].summary.max
    summary = {}
    for record in (r for r in records[1] if r.HasField("summary")):
        summary |= {
            item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
        }
    value = final(tracked).values["fd_digits"]
    assert summary["final/fd_digits"] == value.value and summary["final/fd_digits_stderr"] == value.stderr
    assert summary["final/protocol"] == final(tracked).fingerprint
    assert summary["seed"] == 0 and summary["parameters"] > 10_000


def test_wandb_has_the_evaluation_and_the_weights(tracked, records):
    (table,) = tracked.path.glob("wandb/offline-run-*/files/media/table/final/evaluation_*.table.json")
    assert json.loads(table.read_text()) == {"columns": list(COLUMNS), "data": rows_of(final(tracked))}
    artifacts = {r.artifact.name: r.artifact for r in records[1] if r.HasField("artifact")}
    run_id = f"{tracked.path.parent.name.rpartition('-')[2]}-seed0"
    kept = {entry.path: Path(entry.local_path) for entry in artifacts[f"model-{run_id}"].manifest.contents}
    assert kept.keys() == {"ema.safetensors", "step=00000006.ckpt", "config.yaml"}
    assert kept["ema.safetensors"] == tracked.weights


# ---- Weights & Biases, as its server sees it ----


class Service:
    """Of W&B's server what a client needs to upload a run."""

    def __init__(self):
        self.runs, self.history, self.files, self.exits = {}, defaultdict(list), {}, []
        self.broken, service = False, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(b"")

            def do_PUT(self):
                service.files[self.path.partition("/up/")[2]] = self.body()
                self.answer(b"{}")

            def do_POST(self):
                body = self.body()
                if self.path.endswith("/file_stream"):
                    service.stream(self.path.split("/")[-2], json.loads(body))
                    return self.answer(b"{}")
                if service.broken:
                    return self.answer(b"{}", 503)
                query = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"]).group(1)
                found = getattr(service, operation, lambda variables: {})(query.get("variables") or {})
                return self.answer(json.dumps({"data": found}).encode())

            def body(self):
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

            def answer(self, data, code=200):
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # clients that hang up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stream(self, run, content):
        rows = content.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        assert not rows["content"] or rows["offset"] == len(self.history[run]), "rows would be overwritten"
        self.history[run] += [json.loads(row) for row in rows["content"]]
        if "exitcode" in content:
            self.exits.append(content["exitcode"])

    def Viewer(self, variables):
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _project(self, variables):
        return {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}

    def UpsertBucket(self, variables):
        name = variables["name"]
        self.runs.setdefault(name, {}).update({k: v for k, v in variables.items() if v is not None})
        bucket = {"id": name, "name": name, "displayName": None, "description": "", "config": "{}", "sweepName": None}
        bucket |= {"project": self._project(variables), "historyLineCount": len(self.history[name])}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def RunResumeStatus(self, variables):
        name, known = variables["name"], None
        if name in self.runs:
            rows = self.history[name]
            known = {"id": name, "name": name, "displayName": None, "sweepName": None, "config": "{}", "tags": []}
            known |= {"summaryMetrics": "{}", "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
            known |= {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
            known |= {"wandbConfig": '{"t": 1}'}
        return {"model": {**self._project(variables), "bucket": known}}

    def CreateRunFiles(self, variables):
        files = [{"name": f, "uploadUrl": f"{self.url}/up/{f}"} for f in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def ArtifactType(self, variables):
        return {"project": {"artifact": None}}

    def CreateArtifact(self, variables):
        sequence = {"id": "s", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}


@pytest.fixture
def service(monkeypatch):
    found = Service()
    settle()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", found.url)
    yield found
    settle()
    found.server.shutdown()
    found.server.server_close()


def test_without_a_key_sync_says_what_it_would_do(tracked, capsys):
    assert wandb_command(["sync", str(tracked.path.parents[2])]) == 1
    said = capsys.readouterr().out
    for folder in (tracked.path / "wandb").glob("offline-run-*"):
        assert f"{folder}\n" in said
    assert "these 2 would be uploaded, but there is no key for W&B; wandb login" in said


def test_sync_uploads_both_parts_of_a_run_once(tracked, service, tmp_path, capsys):
    copy = tmp_path / "seed0"
    shutil.copytree(tracked.path, copy, symlinks=True)
    assert wandb_command(["sync", str(tmp_path)]) == 0
    (name,) = service.runs
    assert service.runs[name]["groupName"] == name.removesuffix("-seed0") and service.runs[name]["jobType"] == "train"
    assert_as_csv(service.history[name], tracked)
    assert service.exits == [143, 0]
    sent = {content for file, content in service.files.items() if file.startswith("media/images/samples")}
    assert sent == {(tracked.samples / name).read_bytes() for name in ("step=00000003.png", "final.png")}
    capsys.readouterr()
    assert wandb_command(["sync", str(tmp_path)]) == 0
    assert "nothing to upload" in capsys.readouterr().out


def test_sync_says_that_nobody_answers(tracked, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", AWAY)
    with pytest.raises(DiffxError, match=r"W&B cannot be reached at .*, and 2 folders are to be uploaded"):
        wandb_command(["sync", str(tracked.path)])


def test_mistakes_of_the_command(tmp_path):
    for words, said in (
        ([], "say what to do with W&B; choose diffx wandb sync or workspace"),
        (["sink"], "there is no diffx wandb sink; choose diffx wandb sync or workspace"),
        (["sync", str(tmp_path / "absent")], "there is no folder"),
        (["sync", "--al"], "has no option '--al'"),
        (["workspace", "--uot=x"], "has no option '--uot=x'"),
    ):
        with pytest.raises(DiffxError) as error:
            wandb_command(words)
        assert said in str(error.value)


def test_a_run_online_and_resumed_goes_on_in_its_own(tmp_path, service):
    words = ["logger=wandb", "evaluation.every_n_steps=0", "evaluation.num_samples=0", "extractor=none"]
    _, code = trained(tmp_path, *words, stop_after=4)
    assert code == 143
    _, code = trained(tmp_path, *words)
    (name,) = service.runs
    assert code == 0 and service.exits == [143, 0]
    assert [row["trainer/global_step"] for row in service.history[name]] == [1, 2, 3, 4, 5, 6]
    assert "samples" in service.history[name][-1]


# ---- Weights & Biases, away ----


def assert_intact(run, code, err):
    assert code == 0 and run.state == "finished"
    assert [row["step"] for row in CSVLogger(run.path / "metrics.csv").rows()] == ["1", "2", "3"]
    assert len(err.strip().splitlines()) == 1, err
    settle()
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    rows = [items(r.history.item) for r in wandb_records(next(folder.glob("*.wandb"))) if r.HasField("history")]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]


def test_without_the_network_a_run_is_written_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", AWAY)
    monkeypatch.setenv("WANDB_MODE", "online")
    run, code = trained(tmp_path, "logger=wandb", *NO_EVALUATION)
    err = capfd.readouterr().err
    assert_intact(run, code, err)
    assert f"W&B cannot be reached at {AWAY}: it is written offline; diffx wandb sync '{run.path}'" in err


def test_a_service_that_does_not_open_the_run_is_left_alone(tmp_path, service, capfd):
    service.broken = True
    run, code = trained(tmp_path, "logger=wandb", "logger.wandb.timeout=2", *NO_EVALUATION)
    err = capfd.readouterr().err
    assert_intact(run, code, err)
    assert "W&B does not open the run (" in err and "it is written offline" in err


def test_where_the_key_is_looked_for(tmp_path, monkeypatch):
    assert not has_key()
    netrc = Path(os.environ["NETRC"])
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wb.example.org")
    assert not has_key()
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_key()


# ---- any tracker ----


class Failing(Tracker):
    """Of the user's own package; fails at the second step."""

    told = []

    def __init__(self, about):
        self.about = about

    def start(self):
        self.told.append("start")

    def log_metrics(self, metrics, step):
        self.told.append(step)
        if step == 2:
            raise ConnectionError("the\nserver is gone")

    def log_picture(self, key, picture, step):
        self.told.append(key)

    def log_evaluation(self, name, evaluation, step):
        self.told.append(name)

    def log_files(self, files, step):
        self.told.append([file.name for file in files])

    def finish(self, code):
        self.told.append(f"finish {code}")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capfd):
    Failing.told = []
    own = [f"+logger.own._target_={__name__}.Failing", "+logger.own._partial_=true"]
    run, code = trained(tmp_path, *own, *NO_EVALUATION)
    assert code == 0 and run.state == "finished"
    assert [row["step"] for row in CSVLogger(run.path / "metrics.csv").rows()] == ["1", "2", "3"]
    assert Failing.told == ["start", 1, 2, "finish 0"]
    said = capfd.readouterr().err.strip()
    assert said == (
        "own has failed and is left out from here on (ConnectionError: the server is gone); metrics.csv has everything"
    )


def test_other_ranks_tell_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    Failing.told = []
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Tracked("own", Failing(None))
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_picture("samples", tmp_path / "x.png", 1)
    logger.finish(0)
    assert Failing.told == []


# ---- TensorBoard ----


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard_has_what_the_csv_has(tracked):
    assert len(list((tracked.path / "tensorboard").glob("events.*"))) == 2
    found = events(tracked.path / "tensorboard")
    expected = csv_values(tracked)
    assert set(found.Tags()["scalars"]) - {"epoch"} == expected.keys()
    for name, values in expected.items():
        points = found.Scalars(name)
        assert [point.step for point in points] == list(values), name
        assert [point.value for point in points] == pytest.approx(list(values.values()), rel=1e-6)


def test_tensorboard_has_pictures_the_table_and_the_config(tracked):
    found = events(tracked.path / "tensorboard")
    pictures = {image.step: image for image in found.Images("samples")}
    assert list(pictures) == [3, 6]
    for step, file in ((3, "step=00000003.png"), (6, "final.png")):
        shown = Image.open(io.BytesIO(pictures[step].encoded_image_string))
        assert shown.tobytes() == Image.open(tracked.samples / file).convert("RGB").tobytes()
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    value = final(tracked).values["fd_digits"]
    assert f"| fd_digits | {value.value} | {value.stderr} |" in texts["final/evaluation/text_summary"]
    shown = yaml.safe_load(texts["config/text_summary"])
    assert shown["config"] == tracked.config() and shown["seed"] == 0


def test_tensorboard_forgets_what_a_killed_run_did_after_its_checkpoint(tmp_path):
    before = TensorBoardTracker(About(tmp_path, "id", "group", "name"))
    before.start()
    for step in (1, 2, 3, 4, 5):
        before.log_metrics({"loss": step}, step)  # and never closed
    after = TensorBoardTracker(About(tmp_path, "id", "group", "name", step=3))
    after.start()
    after.log_metrics({"loss": 40.0}, 4)
    after.finish(0)
    assert [(p.step, p.value) for p in events(tmp_path / "tensorboard").Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


# ---- MLflow ----


def mlflow_run(run):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path / 'mlflow' / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "digits")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def plain(name):
    return name.replace("<", " below ").replace(">", " above ")


def test_mlflow_has_what_the_csv_has(tracked):
    client, found = mlflow_run(tracked)
    expected = csv_values(tracked)
    assert found.data.metrics.keys() == {plain(name) for name in expected} | {"seed", "parameters"}
    for name, values in expected.items():
        points = client.get_metric_history(found.info.run_id, plain(name))
        assert sorted((point.step, point.value) for point in points) == sorted(values.items()), name


def test_mlflow_has_the_identity_the_pictures_and_the_evaluation(tracked):
    _, found = mlflow_run(tracked)
    digest = tracked.path.parent.name.rpartition("-")[2]
    assert found.info.status == "FINISHED"
    assert found.data.tags["diffx.run"] == f"{digest}-seed0" and found.data.tags["diffx.group"] == digest
    assert found.data.params["schedule/_target_"] == "diffx.schedules.Cosine" and found.data.params["seed"] == "0"
    folder = tracked.path / "mlflow" / "artifacts" / found.info.run_id / "artifacts"
    pictures = {p.name.split("+")[2]: p for p in (folder / "images").glob("samples+step+*.png")}
    assert pictures.keys() == {"3", "6"}
    assert Image.open(pictures["6"]).tobytes() == Image.open(tracked.samples / "final.png").convert("RGB").tobytes()
    table = json.loads((folder / "final.json").read_text())
    expected = rows_of(final(tracked))
    assert table["columns"] == list(COLUMNS) and [row[0] for row in table["data"]] == [row[0] for row in expected]
    assert [row[1] for row in table["data"]] == pytest.approx([row[1] for row in expected])
    assert yaml.safe_load((folder / "config.yaml").read_text()) == tracked.config()
    kept = {path.name for path in (folder / "model" / "step=00000006").iterdir()}
    assert kept == {"ema.safetensors", "config.yaml"}


def test_mlflow_goes_on_in_its_run_and_takes_no_step_twice(tracked, tmp_path):
    shutil.copytree(tracked.path / "mlflow", tmp_path / "mlflow")
    digest = tracked.path.parent.name.rpartition("-")[2]
    tracker = MLflowTracker(About(tmp_path, f"{digest}-seed0", digest, "name", step=4), experiment="digits")
    tracker.start()
    for step in (5, 6, 7):
        tracker.log_metrics({"loss": 9.0}, step)
    tracker.log_metrics({"new": 1.0}, 6)
    tracker.finish(130)

    class Copy:
        path = tmp_path

    client, found = mlflow_run(Copy)
    assert [p.step for p in client.get_metric_history(found.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert found.data.metrics["new"] == 1.0 and found.info.status == "KILLED"


# ---- a workspace ----


def test_a_workspace_shows_what_differs(tracked, tmp_path, capsys):
    config = tracked.config()
    for k, schedule in enumerate(("cosine", "linear")):
        copy = tmp_path / f"arm{k}" / "seed0"
        shutil.copytree(tracked.path, copy, ignore=shutil.ignore_patterns("wandb", "mlflow", "tensorboard"))
        other, _ = composed(tmp_path, f"schedule={schedule}")
        told = config | {"schedule": other["schedule"], "choices": config["choices"] | {"schedule": schedule}}
        (copy / "config.yaml").write_text(yaml.safe_dump(told))
    out = tmp_path / "workspace.json"
    assert wandb_command(["workspace", str(tmp_path), "--out", str(out), "project=sweeps", "entity=team"]) == 0
    assert "not saved in W&B: there is no key" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert (written["entity"], written["project"]) == ("team", "sweeps")

    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.workspaces import interface, internal

    spec = internal.WorkspaceViewspec.model_validate(written["spec"])
    view = internal.View(entity="team", project="sweeps", display_name="x", name="", id="", spec=spec)
    workspace = interface.Workspace._from_model(view)
    panels = {section.name: section.panels for section in workspace.sections}
    bars = [panel.metrics for panel in panels["Results"] if hasattr(panel, "metrics")]
    assert bars == [[wr.Metric("final/fd_digits")]]
    lines = {panel.y[0].name for name in ("Metrics in training", "Loss", "Speed") for panel in panels[name]}
    assert {"eval/fd_digits", "loss", "images_per_second"} <= lines
    assert panels["Samples"][0].media_keys == ["samples"]
    assert [group.name for group in workspace.runset_settings.groupby] == ["choices.schedule"]
    assert "digits" in workspace.runset_settings.filters


def test_a_workspace_needs_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr("diffx.training.loggers.tracker.find_spec", lambda name: None)
    with pytest.raises(DiffxError, match=r"pip install 'diffx\[workspaces\]'"):
        wandb_command(["workspace", str(tmp_path)])


def test_a_workspace_is_written_where_w_and_b_is_away(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", AWAY)
    out = tmp_path / "workspace.json"
    assert wandb_command(["workspace", str(tracked.path), f"out={out}"]) == 0
    assert "it cannot be reached" in capsys.readouterr().out and out.is_file()


def test_wandb_takes_no_more_than_it_is_asked_for(tmp_path):
    assert WandbTracker(About(tmp_path, "id", "group", "name")).log_model is False
