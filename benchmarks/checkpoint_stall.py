"""How long a checkpoint keeps training waiting: written at once, or copied and written beside training."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from configured import Noise
from measure import Case, Clock
from torch import Tensor, nn
from training_loops import diffx_module

from diffx.training.checkpoints import Checkpoints
from diffx.training.data import StreamData
from diffx.training.fit import fit
from diffx.utils.signals import StopSignal


class Wide(nn.Module):
    """Many parameters and next to no work.

    Arguments:
        layers: matrices.
        width: columns of each, a quarter of its rows.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(4 * width, width) for _ in range(layers))

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        return x * torch.stack([layer.mean() for layer in self.layers]).sum()


def cases(quick: bool, clock: Clock) -> list[Case]:
    """A network of 101 M parameters with AdamW and EMA; the time of its optimizer step bounds a step's from below."""
    network = Wide(24, 32 if quick else 1024)
    source = Noise(16, channels=1, image_size=8, num_classes=10, batch_size=2)
    folder = tempfile.TemporaryDirectory(prefix="diffx-benchmark-")
    place = Path(folder.name)
    module = diffx_module(network, source)
    with torch.random.fork_rng():
        trainer = fit(
            module, StreamData(source, seed=0, accumulate=1), checkpoints=_checkpoints(place / "start"), callbacks=[],
            loggers=[], resume=None, max_steps=1, precision="32-true", gradient_clip_val=None, accelerator="cpu",
            devices=1, num_nodes=1, strategy="auto", accumulate_grad_batches=1,
        ).trainer  # fmt: skip
    checkpoints = _checkpoints(place / "copied")

    def timed(work: Callable[[], object], afterwards: Callable[[], object] = lambda: None) -> Callable[[], float]:
        def run() -> float:
            checkpoints._saved_at = -1  # the trainer stands still, and saves again
            started = clock()
            work()
            spent = clock() - started
            afterwards()
            return spent * 1e6

        run()  # the first copy allocates its memory
        return run

    def whole() -> None:
        assert folder  # is removed with the last of the contenders
        checkpoints.save(trainer)
        checkpoints.wait()

    def step() -> None:
        trainer.optimizers[0].step()
        module.ema.update(module.denoiser, 1)

    contenders = {
        "written at once (AtomicCheckpointIO)": timed(lambda: trainer.save_checkpoint(place / "at_once" / "a.ckpt")),
        "Checkpoints.save: training waits": timed(lambda: checkpoints.save(trainer), checkpoints.wait),
        "Checkpoints.save: until on disk": timed(whole),
        "AdamW and EMA of a step": timed(step),
    }
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    size = (place / "at_once" / "a.ckpt").stat().st_size / 1e9
    title = f"{millions:.1f} M parameters, {size:.2g} GB"
    return [Case("checkpoint, µs", title, contenders, 2 if quick else 5)]


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, 10**9, 1, None, "benchmark", StopSignal())
