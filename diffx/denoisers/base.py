"""What everything downstream sees of a diffusion model."""

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

from diffx.schedules import NoiseLevel, Schedule
from diffx.utils import DiffxError


class Denoiser(nn.Module, ABC):
    """An estimate of E[x | x_t] at every noise level, together with the schedule that defines x_t.

    Attributes:
        schedule: the forward process; the denoiser is its one owner.
    """

    schedule: Schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The denoised estimate.

        Arguments:
            x_t: noisy samples, shape `[B, *]`.
            t: times in [0, 1], shape `[]` or `[B]`.
            cond: conditions, each of shape `[B, …]`, such as `label` int64 `[B]`.

        Returns:
            x̂, shape `[B, *]`.
        """

    def at(self, level: NoiseLevel) -> "Denoiser":
        """The denoiser to ask at one noise level of a sampler's grid, whose numbers the host knows.

        What the level decides is decided here, on the host, so that no step waits for the device: guidance outside its
        interval is the denoiser that it guides. A denoiser around another one, asked at the same time, passes it on;
        where nothing is to be decided it is the denoiser itself.

        Arguments:
            level: the noise level; one of tensors, a time for each sample, decides nothing.

        Returns:
            A denoiser with the same estimates at `level.t`, and at no other time.
        """
        return self

    def for_trajectory(self) -> "Denoiser":
        """The denoiser to ask along one trajectory of a batch, step after step.

        Where something is remembered from step to step (see `diffx.guidance.Projected`), the memory is empty and not
        shared; otherwise it is the denoiser itself.
        """
        return self.replaced(
            **{name: part.for_trajectory() for name, part in self.named_children() if isinstance(part, Denoiser)}
        )

    def replaced(self, **attributes: Any) -> Self:
        """This denoiser with other values of some attributes; everything else is shared.

        Arguments:
            attributes: the new values by name.
        """
        if all(getattr(self, name) is value for name, value in attributes.items()):
            return self
        modules = {name: value for name, value in attributes.items() if name in self._modules}
        values = {name: value for name, value in attributes.items() if name not in modules}
        twin = type(self).__new__(type(self))
        # copy.copy would share the dictionary of the modules
        vars(twin).update(vars(self) | values | {"_modules": {**self._modules, **modules}})
        return twin

    def posterior(self, x_t: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """The denoised estimate and the variance of a step back, for denoisers that know it.

        The variance of x_s given x_t is exp(v·log β + (1 − v)·log β̃) with β = σ²_{t|s} and β̃ = β·σ_s²/σ_t² (Nichol
        and Dhariwal, arXiv 2102.09672, Eq. 15).

        Arguments:
            x_t: noisy samples, shape `[B, *]`.
            t: times in (0, 1], shape `[]` or `[B]`.
            s: the times after the step, < t, shape of t.
            cond: as for `forward`.

        Returns:
            x̂ and v, each of shape `[B, *]`.

        Raises:
            DiffxError: if the denoiser knows no variance.
        """
        raise DiffxError(
            f"{type(self).__name__} has no learned variance; set denoiser=learned_variance for training, and take "
            "another sampler than ddpm_learned for a model without it"
        )
