"""The tiny world and models of random weights in a store, and commands that use them."""

import os
from dataclasses import dataclass

import torch
from pyarrow import fs

from cvmatch.data import storage
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning
from cvmatch.segment.batches import Preprocess
from cvmatch.segment.model import Segmenter
from cvmatch.training import checkpoints
from tests.helpers import index as tiny
from tests.helpers.cluster import ROOT

SEGFORMER = os.path.relpath(base_models.SEGFORMER, ROOT)
"""Base of the segmenter: it comes with a job's working directory."""

_NAMES = ("world", "generator", "segmenter", "matcher")


@dataclass(frozen=True)
class Toys:
    """Locations in the store, and the commands of jobs on them."""

    bucket: str
    world: str
    generator: str
    segmenter: str
    matcher: str

    def synthesize(self, output: str, *more: str) -> list[str]:
        """The job that draws the world's 24 training pairs, in about half a minute."""
        return [
            "python", "jobs/synthesize.py", "--data.root", self.world, "--data.block", "2",
            "--generate.model", self.generator, "--segment.model", self.segmenter,
            "--generate.num-inference-steps", "20", "--generate.pool.batch", "2",
            "--output", output, *more,
        ]  # fmt: skip

    def build_index(self, rows: str, output: str) -> list[str]:
        """The job that makes an index of rows, which also measure its shortlist."""
        return [
            "python", "jobs/build_index.py", "--rows", rows, "--queries", rows,
            "--model", self.matcher, "--output", output,
        ]  # fmt: skip

    def search_rows(self, rows: str, index: str, output: str) -> list[str]:
        """The job that finds five tiles of each row."""
        return [
            "python", "jobs/search_rows.py", "--rows", rows, "--index", index, "--top-k", "5",
            "--output", output,
        ]  # fmt: skip

    def train(self, name: str, *more: str) -> list[str]:
        """The job that trains the segmenter for two epochs, as the run of that name."""
        return [
            "python", "jobs/train_segmenter.py", "--base", SEGFORMER, "--size", "64",
            "--data.root", self.world, "--val.root", self.world, "--val.split", "val",
            "--output", f"{self.bucket}/models/{name}", "--fit.storage", f"{self.bucket}/runs",
            "--fit.name", name, "--fit.epochs", "2", "--fit.batch", "4", *more,
        ]  # fmt: skip


def make_toys(folder: str, bucket: str) -> Toys:
    """Make them in a folder, and copy them to a bucket."""
    make_world(MakeWorld(output=f"{folder}/world", preset="tiny"))
    torch.manual_seed(0)
    conditioning = Conditioning(panorama_width=256)
    generator = Generator.base(base_models.DIFFUSION, base_models.CLIP, conditioning)
    generator.save(f"{folder}/generator")
    Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=64)).save(f"{folder}/segmenter")
    tiny.matcher(f"{folder}/matcher", branches=("direct", "layout"))
    for name in _NAMES:
        checkpoints.copy_tree(fs.LocalFileSystem(), f"{folder}/{name}", f"{bucket}/{name}")
        assert storage.names(f"{bucket}/{name}") == sorted(os.listdir(f"{folder}/{name}"))
    return Toys(bucket, *(f"{bucket}/{name}" for name in _NAMES))
