"""`diffx reference`."""

from pathlib import Path

from rich.console import Console

from diffx.cli.build import build_evaluator
from diffx.cli.evaluate_images import configured
from diffx.cli.sample import device_of
from diffx.utils import DiffxError


def main(argv: list[str]) -> int:
    """Computes the statistics of a split, or finds them in the cache; returns the exit code."""
    console = Console()
    config, source = configured(argv, "diffx_reference", {})
    split = config["evaluation"]["reference"]
    if split not in ("train", "test"):
        raise DiffxError(f"evaluation.reference={split} is a file already; choose the split train or test")
    out = None if config["out"] is None else Path(config["out"]).expanduser()
    if out is not None and out.suffix != ".npz":
        raise DiffxError(f"out={out} must end in .npz")
    evaluator = build_evaluator(config, source)
    if not evaluator.extractor.dim:
        raise DiffxError("extractor=none has no features; choose an extractor")
    evaluator.check()
    evaluator.extractor.to(device_of(config))
    reference = evaluator.references(2)
    # the cache shall hold the features too, for kid, pr, dc and cmmd
    statistics, features = reference.statistics, reference.features
    console.print(
        f"{source.name}, {split}: mean and covariance of {statistics.n} images and the features of {len(features)}, by "
        f"extractor {evaluator.extractor.name}, are in the cache",
        highlight=False,
    )
    if out is not None:
        statistics.save(out)
        console.print(f"statistics  {out}\nuse them: diffx evaluate run=DIR evaluation.reference={out}", soft_wrap=True)
    return 0
