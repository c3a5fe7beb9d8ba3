"""A training step through the whole path of diffx, and of those one would use instead, over the same network."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from configured import Noise, backbone
from measure import Case, Clock
from torch import Tensor, nn
from training_loops import Setting, check_same_loss, run_bare, run_diffx, run_lightning

from diffx.data import DataSource, Digits

CLASSES = 10
PEERS = {
    "diffusers + accelerate": ("run_diffusers", ("diffusers", "accelerate")),
    "lucidrains' Trainer": ("run_lucidrains", ("denoising_diffusion_pytorch", "accelerate")),
}


class Null(nn.Module):
    """Next to no network: 2 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        return self.layer(x)


def cases(quick: bool, clock: Clock) -> list[Case]:
    """The null network shows the overhead itself, the others what it amounts to."""
    digits = Digits(
        name="digits", channels=1, image_size=8, num_classes=CLASSES, batch_size=64, flip=False, num_workers=0
    )
    unet = {"base": 32, "mult": [1, 2], "blocks": 1} if quick else {}
    dit = {"width": 32, "depth": 1, "heads": 2} if quick else {}
    few, rounds, large = (2, 1, 1) if quick else (20, 5, 3)
    return [
        _case("null network", Null(), digits, 10, 20 if quick else 200, 2 if quick else 9, clock),
        _case("unet_digits", backbone("unet_digits", 1, 8, CLASSES), digits, 2, few, rounds, clock),
        _case("ddpm_cifar10", backbone("ddpm_cifar10", 3, 32, CLASSES, **unet), noise(3), 3, 2, large, clock),
        _case("dit_s_2", backbone("dit_s_2", 4, 32, CLASSES, **dit), noise(4), 3, 2, large, clock),
    ]


def noise(channels: int) -> Noise:
    """Batches of two at 32×32, so that a step of a large network takes a second or two on one core."""
    return Noise(16, channels=channels, image_size=32, num_classes=CLASSES, batch_size=2)


def _case(
    name: str, network: nn.Module, source: DataSource, warm_up: int, steps: int, rounds: int, clock: Clock
) -> Case:
    check_same_loss(network, source)
    setting = Setting(network, source, warm_up, steps, clock)
    contenders: dict[str, Callable[[], float]] = {
        "bare loop": partial(run_bare, setting),
        "Lightning alone": partial(run_lightning, setting),
        "diffx": partial(run_diffx, setting),
    }
    for peer, (function, packages) in PEERS.items():
        if all(find_spec(package) is not None for package in packages):
            contenders[peer] = partial(_peer, function, setting)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    shape = [source.batch_size, source.channels, source.image_size, source.image_size]
    title = f"{name} {shape}, {parameters:.1f} M parameters"
    return Case("training, µs per step", title, contenders, rounds)


def _peer(function: str, setting: Setting) -> float:
    import training_peers

    return getattr(training_peers, function)(setting)
