"""Which of several processes this one is, whoever has started them."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from diffx.utils import DiffxError


def started_by() -> ClusterEnvironment | None:
    """Who has started the processes, where Lightning would guess wrong; None for a process on its own."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "LOCAL_RANK" in os.environ:  # diffx itself, perhaps inside a SLURM job
        return LightningEnvironment()
    if _under_slurm():
        # its own handler saves inside the handler, and registers only where nobody else has
        return SLURMEnvironment(auto_requeue=False)
    return None


def _under_slurm() -> bool:
    with warnings.catch_warnings():
        # it advises srun wherever there is one, on a login node too
        warnings.filterwarnings("ignore", message=".*srun. command is available.*")
        return SLURMEnvironment.detect()


def over_ranks(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum over all processes, in place; the values themselves where there is one process.

    The host does not wait for a GPU, as it would in Lightning's `reduce`, which begins with a barrier.

    Arguments:
        values: of any shape, the same on all ranks.
        op: another operation, such as `dist.ReduceOp.MIN`.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op)
    return values


@contextmanager
def process_group(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """Joins the processes that were started together, for a command that needs no trainer.

    Arguments:
        device: `cpu`, `cuda` (each process takes that of its local rank), or one of several as `cuda:1`.

    Yields:
        The rank, the number of processes, and the device of this one.

    Raises:
        DiffxError: if the processes do not find each other.
    """
    environment = started_by()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(environment, SLURMEnvironment):
        world_size = environment.world_size()
    if environment is None or world_size == 1:
        yield 0, 1, torch.device(device)
        return
    own = isinstance(environment, LightningEnvironment)  # on one node
    rank = environment.local_rank() if own else environment.global_rank()
    target = torch.device("cuda", environment.local_rank()) if device == "cuda" else torch.device(device)
    try:
        dist.init_process_group(
            "nccl" if target.type == "cuda" else "gloo",
            init_method=f"tcp://{environment.main_address}:{environment.main_port}",
            rank=rank,
            world_size=world_size,
        )
    except (RuntimeError, ValueError) as error:
        raise DiffxError(
            f"the {world_size} processes do not find each other at {environment.main_address}:"
            f"{environment.main_port} ({str(error).splitlines()[0]}); check MASTER_ADDR and MASTER_PORT"
        ) from error
    if target.type == "cuda":
        torch.cuda.set_device(target)
    try:
        yield rank, world_size, target
    finally:
        dist.destroy_process_group()
