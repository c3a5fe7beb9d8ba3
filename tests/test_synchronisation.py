"""No step of training waits for the device: neither a value read by the host, nor a shape that depends on values."""

import traceback
import warnings
from contextlib import contextmanager
from functools import partial

import lightning as L
import pytest
import torch
import torch.distributed as dist
from conftest import build, each
from rich.console import Console
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

from diffx.autoencoders import Pixels
from diffx.backbones import UNet
from diffx.conditioning import LabelConditioner
from diffx.data import Digits
from diffx.denoisers import LearnedVariance, Preconditioned
from diffx.objectives import ELBO, Denoising, Hybrid
from diffx.training import EMA, DiffusionModule
from diffx.training.callbacks import ProgressBar
from diffx.training.checkpoints import Checkpoints
from diffx.training.data import StreamData
from diffx.training.fit import fit
from diffx.training.log import TrainingLog
from diffx.training.loggers import CSVLogger
from diffx.training.lr_schedules import Constant
from diffx.training.nonfinite import NonFinite
from diffx.utils.signals import StopSignal

BATCH = 8


def module(
    denoiser=Preconditioned, objective=Denoising, schedule="linear", time_sampler="stratified", weighting="unit"
):
    """What is trained; the parameterization suits every schedule."""
    channels = 2 if denoiser is LearnedVariance else 1
    network = UNet(1, 8, 16, [1, 2], 1, groups=8, num_classes=10, out_channels=channels)
    model = denoiser(network, build("schedule", schedule), build("parameterization", "v"))
    parts = () if objective is ELBO else (build("time_sampler", time_sampler), build("weighting", weighting))
    optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    conditioner = LabelConditioner(10, 0.1)
    return DiffusionModule(
        model,
        objective(*parts),
        Pixels(),
        conditioner,
        EMA(model, 0.9),
        optimizer,
        Constant(),
        seed=0,
        batch_size=BATCH,
    )


@contextmanager
def on_a_fake_gpu(trained):
    """Moves a module to a GPU that has shapes and no values: whoever asks for a value is found out."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            trained._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))
            yield {
                "x": torch.zeros(BATCH, 1, 8, 8, dtype=torch.uint8, device="cuda"),
                "label": torch.zeros(BATCH, dtype=torch.int64, device="cuda"),
                "index": torch.arange(BATCH, device="cuda"),
            }
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        from diffx.utils import random

        random._positions.cache_clear()  # no tensors without values for those who come later


class Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAITING:
            frame = traceback.extract_stack()[-2]
            self.found.append(f"{function.overloadpacket.__name__} at {frame.filename}:{frame.lineno}")
        return function(*args, **(kwargs or {}))


def step(trained):
    with on_a_fake_gpu(trained) as batch:
        outputs = trained.training_step(batch, 0)
        assert outputs["loss"].device.type == "cuda"
        trained.ema.update(trained.denoiser, 1)


def test_the_fake_gpu_finds_out_who_asks_for_a_value():
    with on_a_fake_gpu(torch.nn.Linear(2, 2)) as batch:
        with pytest.raises(DataDependentOutputException):
            batch["label"].sum().item()
        with pytest.raises(DynamicOutputShapeException):
            batch["label"].nonzero()


@each("time_sampler")
def test_no_time_sampler_waits(time_sampler):
    step(module(time_sampler=time_sampler))


@each("schedule")
def test_no_schedule_waits(schedule):
    step(module(schedule=schedule))


@pytest.mark.parametrize("weighting", ["constant", "learned_uncertainty", "min_snr", "p2", "sigmoid", "unit"])
def test_no_weighting_waits(weighting):
    step(module(weighting=weighting))


DERIVED = {
    "the ELBO weighting": {"weighting": "elbo"},
    "the ELBO": {"objective": ELBO},
    "the hybrid objective": {"objective": Hybrid, "denoiser": LearnedVariance},
}


@pytest.mark.parametrize("parts", DERIVED.values(), ids=DERIVED)
def test_what_takes_derivatives_does_not_wait_either(parts):
    # on the CPU: autograd does not know the fake GPU
    index = torch.arange(BATCH)
    batch = {"x": torch.zeros(BATCH, 1, 8, 8, dtype=torch.uint8), "label": index % 10, "index": index}
    trained, reads = module(**parts), Reads()
    with reads:
        trained.training_step(batch, 0)["loss"].backward()
    assert reads.found == []


def train(folder, accelerator, callbacks, max_steps, strategy="auto", accumulate=1):
    """Trains as `diffx train` does, with further callbacks."""
    source = Digits(
        name="digits", channels=1, image_size=8, num_classes=10, batch_size=BATCH, flip=False, num_workers=0
    )
    log = TrainingLog(every_n_steps=5)
    with (folder / "bar").open("w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bar = ProgressBar(log, Console(force_terminal=True, file=file), refresh_seconds=0)
        fit(
            module(),
            StreamData(source, seed=0, accumulate=accumulate),
            checkpoints=Checkpoints(folder, 1000, 1, None, "test", StopSignal()),
            callbacks=[*callbacks, log, bar, NonFinite("stop", 5, 1000, folder / "nonfinite.jsonl")],
            loggers=[CSVLogger(folder / "metrics.csv")],
            resume=None,
            max_steps=max_steps,
            precision="32-true" if accelerator == "cpu" else "bf16-mixed",
            gradient_clip_val=1.0,
            accelerator=accelerator,
            devices=1,
            num_nodes=1,
            strategy=strategy,
            accumulate_grad_batches=accumulate,
        )


class Watch(L.Callback):
    """The first of the callbacks: enters a context at the start of one step and leaves it at the start of another."""

    def __init__(self, context, first, last):
        self.context, self.first, self.last = context, first, last

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.first:
            self.context.__enter__()
        if trainer.global_step == self.last:
            self.context.__exit__(None, None, None)


def test_no_step_of_the_whole_path_reads_a_value(tmp_path):
    reads = Reads()
    # on the CPU the log reads at the end of its window, every 5 steps
    train(tmp_path, "cpu", [Watch(reads, 11, 14)], max_steps=20)
    assert reads.found == []


class Strict:
    """PyTorch's own check: an error at every synchronisation."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_on_a_gpu_synchronises(tmp_path):
    train(tmp_path, "gpu", [Watch(Strict(), 12, 18)], max_steps=20)  # over a row of the log


class Reductions(L.Callback):
    """Counts how often the gradients go over the network."""

    def __init__(self):
        self.steps = {}

    def on_train_start(self, trainer, pl_module):
        def reduce(_, bucket):
            self.steps[trainer.global_step] = self.steps.get(trainer.global_step, 0) + 1
            return allreduce_hook(dist.group.WORLD, bucket)

        trainer.strategy.model.register_comm_hook(None, reduce)


def test_accumulated_gradients_go_over_the_network_once_per_step(tmp_path):
    counted = Reductions()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/sync", rank=0, world_size=1)
    try:
        train(tmp_path, "cpu", [counted], max_steps=3, strategy="ddp", accumulate=4)
    finally:
        dist.destroy_process_group()
    assert counted.steps == {0: 1, 1: 1, 2: 1}  # one bucket, which is all of this network
