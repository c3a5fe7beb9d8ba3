"""`diffx evaluate images=PATH`: images that any program has written."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console

from diffx.cli.build import build_evaluator, make
from diffx.cli.compose import compose_config, parse, refuse_sweep
from diffx.cli.measure import table
from diffx.cli.sample import device_of
from diffx.data import DataSource
from diffx.data.image_set import load_images
from diffx.evaluation import Evaluation
from diffx.experiment import Record, fingerprint
from diffx.experiment.record import command_line
from diffx.utils import DiffxError

PRIMARY: dict[str, Any] = {
    "defaults": [{"data": "digits"}, {"extractor": "digits"}, {"metrics": ["fd", "is", "consistency"]}, "_self_"],
    "evaluation": {"reference": "train", "batch_size": 256, "save_every": 10_000},
    "seed": 0,
    "out": None,
    "device": "auto",
}
"""What a command needs that measures without a run."""


def main(argv: list[str]) -> int:
    """Measures the images, writes one JSON and returns the exit code."""
    console, started = Console(), time.perf_counter()
    config, source = configured(argv, "diffx_evaluate_images", {"images": None})
    out = Path(config["out"] or f"{config['images'].rstrip('/')}.evaluation.json").expanduser()
    if out.suffix != ".json":
        raise DiffxError(f"out={out} must end in .json")
    evaluator = build_evaluator(config, source)
    evaluator.check()
    images = load_images(config["images"], source.channels, source.image_size)
    evaluator.extractor.to(device_of(config))
    measured = evaluator.measure(images)
    protocol = {
        **evaluator.protocol(),
        "metrics": config["metrics"],
        "images": config["images"],
        "num_samples": len(images),
        "images_fingerprint": images.fingerprint(),
    }
    digest = fingerprint({key: value for key, value in protocol.items() if not key.startswith("images")})
    record = Record.now(command_line())
    evaluation = Evaluation(
        measured.values | evaluator.baselines(),
        protocol,
        digest,
        {**measured.seconds, "total": time.perf_counter() - started},
        measured.omitted,
        {key: config[key] for key in ("data", "extractor", "metrics", "evaluation")},
        record.command,
        asdict(record),
    )
    evaluation.save(out)
    console.print(table(evaluation))
    console.print(f"evaluation  {out}", highlight=False, soft_wrap=True)
    return 0


def configured(argv: list[str], name: str, extra: dict[str, Any]) -> tuple[dict[str, Any], DataSource]:
    """The config of a command that measures without a run, and its data set."""
    arguments = parse(argv)
    refuse_sweep(arguments.overrides)
    ConfigStore.instance().store(name=name, node=OmegaConf.create(PRIMARY | extra))
    config = compose_config(name, arguments.overrides, arguments.config_dirs)
    source: DataSource = make(config, "data")
    source.prepare()
    source.check()
    return config, source
