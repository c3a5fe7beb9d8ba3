"""Weights for inference, apart from the checkpoints of training."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from diffx.denoisers import Denoiser
from diffx.training.checkpoint_files import read_checkpoint
from diffx.training.ema import EMA
from diffx.utils import DiffxError, atomic_path, nearest, patiently


def export_weights(denoiser: nn.Module, path: Path, step: int, **details: str) -> None:
    """Writes the weights for inference as safetensors.

    Arguments:
        denoiser: the denoiser of an EMA.
        path: the file.
        step: the training step, kept as metadata.
        details: more metadata.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.state_dict().items()}

    def write() -> None:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step), **details})

    patiently(write)


def load_weights(ema: EMA, name: str, folder: Path, checkpoint: Path | None) -> tuple[Denoiser, int]:
    """Loads exported weights, or, of a run that has not finished, the EMA in its newest checkpoint.

    Arguments:
        ema: the EMA of the run.
        name: which weights: `ema`, `ema_<decay>` or `best`.
        folder: the run's folder of exported weights.
        checkpoint: the newest checkpoint.

    Returns:
        The denoiser with the weights, and the training step that they are of.

    Raises:
        DiffxError: if there are none of that name, they cannot be read, or are of another network.
    """
    file = folder / f"{name}.safetensors"
    averages = ema.named()
    denoiser = averages.get(name, ema.denoiser)
    try:
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
                step = int(opened.metadata()["step"])
        elif checkpoint is not None and name in averages:
            whole = read_checkpoint(checkpoint)
            k = list(averages).index(name)
            prefix = f"ema.others.{k - 1}." if k else "ema.denoiser."
            state = {
                key.removeprefix(prefix): value for key, value in whole["state_dict"].items() if key.startswith(prefix)
            }
            step = int(whole["global_step"])
        else:
            exported = {path.stem for path in folder.glob("*.safetensors")}
            known = sorted(exported | (set(averages) if checkpoint else set()))
            raise DiffxError(
                f"'{folder.parent}' has no weights '{name}'{nearest(name, known)}; choose weights={' or '.join(known)}"
                if known
                else f"there are no weights in '{folder.parent}': the run has no checkpoint yet; train it first"
            )
        denoiser.load_state_dict(state)
    except DiffxError:
        raise
    except Exception as error:  # safetensors, zip and key errors share no base class
        raise DiffxError(
            f"the weights '{name}' in '{folder.parent}' cannot be loaded ({str(error).splitlines()[0]}); train the run "
            "again, or give the run of which they are"
        ) from error
    return denoiser, step


class BestWeights:
    """Keeps the weights with the best value of a metric measured in training.

    The file itself remembers the value, so that a resumed run goes on from there.

    Arguments:
        path: the file.
        monitor: the metric, as `fd_digits`.
        mode: `min` or `max`, as in Lightning's `ModelCheckpoint`.
    """

    def __init__(self, path: Path, monitor: str, mode: str) -> None:
        self.path = Path(path)
        self.monitor = monitor
        self.mode = mode

    def offer(self, value: float, denoiser: nn.Module, step: int) -> bool:
        """Writes the weights if they are better than those in the file, and says whether they are."""
        best = self._best()
        better = best is None or (value < best if self.mode == "min" else value > best)
        if better and value == value:
            export_weights(denoiser, self.path, step, monitor=self.monitor, mode=self.mode, value=repr(value))
            return True
        return False

    def _best(self) -> float | None:
        try:
            with safe_open(self.path, framework="pt") as file:
                said = file.metadata()
            return float(said["value"]) if (said["monitor"], said["mode"]) == (self.monitor, self.mode) else None
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None
