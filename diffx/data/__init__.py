"""Data sets: uint8 images by position, and the training stream as a function of (seed, global sample number)."""

from diffx.data.base import Batch, DataSource, Images, SplitName, TensorImages
from diffx.data.digits import Digits
from diffx.data.folder import FileImages, Folder
from diffx.data.latents import Latents
from diffx.data.loader import StreamLoader
from diffx.data.map_source import Found, MapSource
from diffx.data.shards import WebDataset
from diffx.data.stream import GlobalBatches, Stream, train_loader
from diffx.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST, IdxSource

__all__ = [
    "CIFAR10",
    "MNIST",
    "Batch",
    "DataSource",
    "Digits",
    "FashionMNIST",
    "FileImages",
    "Folder",
    "Found",
    "GlobalBatches",
    "IdxSource",
    "Images",
    "Latents",
    "MapSource",
    "SplitName",
    "Stream",
    "StreamLoader",
    "TensorImages",
    "WebDataset",
    "train_loader",
]
