"""The one path from seeds to images, for callbacks, `diffx sample` and `diffx evaluate`.

Sample k of seed s has the same initial noise, the same noise in every step and the same label at any batch size and on
any number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffx.autoencoders import Autoencoder
from diffx.conditioning import Conditioner
from diffx.denoisers import Autocast, Denoiser
from diffx.discretizations import Discretization
from diffx.samplers import Sampler
from diffx.utils import DiffxError, Keys


class Generated(NamedTuple):
    """A batch of samples: numbers int64 `[B]`, labels int64 `[B]`, images uint8 `[B, C, H, W]`."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]: no one searches a batch with tuple.index
    label: Tensor
    images: Tensor


@dataclass(frozen=True)
class Generator:
    """Everything between a sample's number and its image.

    Arguments:
        denoiser: the denoiser as it is sampled: guided and thresholded, on the schedule to sample on.
        sampler: the solver.
        discretization: the time grid.
        steps: number of steps K ≥ 1.
        autoencoder: decodes what the sampler returns.
        conditioner: turns labels into conditions.
        shape: shape of one latent (or of one image in [−1, 1]), (C, H, W).
        seed: the seed of initial noise and sampler noise.
        num_classes: number of classes; sample k is of class k mod num_classes unless labels are given.
        precision: what the networks compute in: 32-true, bf16-mixed or 16-mixed (`diffx.denoisers.Autocast`).
        static_shapes: whether the last of several batches is filled up to their size and the surplus dropped, since a
            compiled network would be compiled again for another size.
    """

    denoiser: Denoiser
    sampler: Sampler
    discretization: Discretization
    steps: int
    autoencoder: Autoencoder
    conditioner: Conditioner
    shape: tuple[int, int, int]
    seed: int = 0
    num_classes: int = 0
    precision: str = "32-true"
    static_shapes: bool = False

    def times(self) -> Tensor:
        """The time grid, float64 `[K + 1]`."""
        return self.discretization(self.denoiser.schedule, self.steps)

    @property
    def nfe(self) -> int | None:
        """Denoiser calls per sample, None where the sampler finds its steps itself (`diffx.samplers.Counted` counts).

        Guidance that needs two networks calls each of them as often.
        """
        return self.sampler.nfe(self.steps)

    def labels(self, index: Tensor) -> Tensor:
        """The balanced default labels of samples, int64 `[B]`: k mod num_classes."""
        return index % max(self.num_classes, 1)

    @torch.no_grad()
    def trajectory(self, index: Tensor, label: Tensor | None = None) -> Iterator[Tensor]:
        """The latents after each step.

        Arguments:
            index: sample numbers, int64 `[B]`, on the device to sample on.
            label: classes, int64 `[B]`; the balanced ones by default.

        Yields:
            K times `[B, *shape]`, in float32.
        """
        label = self.labels(index) if label is None else label
        keys = Keys(self.seed, index)
        times = self.times()
        schedule = self.denoiser.schedule
        _, sigma = schedule(times[:1].to(schedule.device))
        x = keys.normal("sample", *self.shape) * sigma.to(index.device, torch.float32)

        def noise(step: int, draw: int = 0) -> Tensor:
            return keys.at(step).normal(f"sampler/{draw}", *self.shape)

        cond = self.conditioner({"label": label})
        denoiser = Autocast(self.denoiser, self.precision)
        yield from self.sampler.trajectory(denoiser, x, times.to(index.device), noise=noise, **cond)

    @torch.no_grad()
    def __call__(self, index: Tensor, label: Tensor | None = None) -> Generated:
        """Samples by number; arguments as for `trajectory`.

        Raises:
            DiffxError: if a sample is not finite: as uint8 it would pass for black and be measured.
        """
        label = self.labels(index) if label is None else label
        x = torch.empty(0)
        for x in self.trajectory(index, label):  # noqa: B007
            pass
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            first, count = int(index[~finite][0]), int((~finite).sum())
            raise DiffxError(
                f"{count} of {len(index)} samples are not finite (the first is sample {first}): the weights have "
                "diverged, or the sampler has; try thresholding=static, more sampler.steps or a smaller guidance.scale"
            )
        return Generated(index, label, self.autoencoder.decode(x))

    def batches(
        self,
        total: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        first: int = 0,
        labels: Sequence[int] | None = None,
    ) -> Iterator[Generated]:
        """Samples first … total − 1, this rank's share of them, in batches.

        The k-th batches of all ranks together are the next batch_size·world_size samples, without a gap.

        Arguments:
            total: number of samples over all ranks.
            batch_size: samples per batch on this rank.
            device: where to sample.
            rank: this process.
            world_size: number of processes; samples are dealt out in turn, so that shares differ by at most one.
            first: the first sample.
            labels: sample k is of class labels[k mod len(labels)]; the balanced classes by default.

        Yields:
            Batches of samples.
        """
        share = torch.arange(first, total, device=device)[rank::world_size]
        classes = None if labels is None else torch.tensor(labels, device=device)
        # splitting nothing gives one empty batch
        for index in share.split(batch_size) if len(share) else ():
            surplus = batch_size - len(index) if self.static_shapes and len(share) > batch_size else 0
            asked = torch.cat([index, index[-1:].expand(surplus)])
            made = self(asked, None if classes is None else classes[asked % len(classes)])
            yield Generated(*(value[: len(index)] for value in made))
