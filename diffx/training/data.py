"""The training stream as Lightning takes it."""

from collections.abc import Iterable

import lightning as L

from diffx.data import DataSource


class StreamData(L.LightningDataModule):
    """The source's endless stream, from the step at which the trainer stands.

    Arguments:
        source: the data.
        seed: the seed of the run.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(self, source: DataSource, seed: int, accumulate: int) -> None:
        super().__init__()
        self.source = source
        self.seed = seed
        self.accumulate = accumulate

    def train_dataloader(self) -> Iterable[dict]:
        """The loader of this rank. Called after the loops' state has been restored, so that it resumes by itself."""
        trainer = self.trainer
        assert trainer is not None
        return self.source.train_loader(
            seed=self.seed,
            start_step=trainer.global_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=self.accumulate,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
