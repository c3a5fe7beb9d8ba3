"""The same network trained as the users of other libraries train theirs: each with its own loss, loop and EMA.

Both are shown ε-prediction without labels; what they do in a step is told in README.md.
"""

import contextlib
import copy
import itertools
import os
import tempfile
from collections.abc import Iterator
from os import devnull
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU too, all contenders stay on the CPU

import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from training_loops import CLIP, DECAY, LR, Setting, epoch

T = 1000


class Timestep(nn.Module):
    """A network that is told an integer step instead of a logSNR, and no label."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        # what lucidrains' GaussianDiffusion asks of its model
        self.channels = self.out_dim = channels
        self.self_condition = False

    def forward(self, x_t: Tensor, step: Tensor, x_self_cond: None = None) -> Tensor:
        return self.network(x_t, step.float() / T, None)


class Ready(Dataset[Tensor]):
    """Batches that are ready in memory, in [−1, 1], over and over."""

    def __init__(self, setting: Setting, total: int) -> None:
        self.batches = [batch["x"].float() / 127.5 - 1 for batch in epoch(setting.source)]
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, k: int) -> Tensor:
        return self.batches[k % len(self.batches)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars are drawn, into nothing."""
    with Path(devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def run_diffusers(setting: Setting) -> float:
    """The steps of diffusers' example of unconditional training, with accelerate, without its trackers."""
    accelerator = Accelerator()
    network = Timestep(copy.deepcopy(setting.network), setting.source.channels)
    average = EMAModel(network.parameters(), decay=DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    timed = setting.timed([])
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=timed.total)
    loader = DataLoader(Ready(setting, timed.total), batch_size=None)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    timed.batches = loader
    noising = DDPMScheduler(num_train_timesteps=T)
    with quiet(), tqdm(total=timed.total) as bar:
        for n, x in enumerate(timed, start=1):
            noise = torch.randn_like(x)
            step = torch.randint(0, T, (len(x),), device=x.device)
            x_t = noising.add_noise(x, noise, step)  # pyright: ignore[reportArgumentType]
            with accelerator.accumulate(network):
                loss = F.mse_loss(network(x_t, step).float(), noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                average.step(network.parameters())
                bar.update(1)
            logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0], "step": n}
            logs["ema_decay"] = average.cur_decay_value
            bar.set_postfix(**logs)
            accelerator.log(logs, step=n)
    return timed.microseconds


def run_lucidrains(setting: Setting) -> float:
    """`Trainer.train()` of denoising-diffusion-pytorch itself; only its loader is replaced by batches in memory."""
    source = setting.source
    network = Timestep(copy.deepcopy(setting.network), source.channels)
    diffusion = GaussianDiffusion(network, image_size=source.image_size, timesteps=T, objective="pred_noise")
    batches = [batch["x"].float() / 255 for batch in epoch(source)]
    timed = setting.timed(itertools.cycle(batches))
    with tempfile.TemporaryDirectory() as folder, quiet():
        for k in range(100):  # it asks for so many images, and never opens these
            (Path(folder) / f"{k}.png").touch()
        trainer = Trainer(
            diffusion,
            folder,
            train_batch_size=max(16, source.batch_size),  # of the loader that is replaced; it refuses less
            train_lr=LR,
            train_num_steps=timed.total,
            ema_update_every=1,
            ema_decay=DECAY,
            save_and_sample_every=10**9,
            results_folder=str(Path(folder) / "results"),
            calculate_fid=False,
            max_grad_norm=CLIP,
        )
        trainer.ema.update_after_step = -1  # averaging, not copying, from the start
        trainer.dl = iter(timed)  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train()
    return timed.microseconds
