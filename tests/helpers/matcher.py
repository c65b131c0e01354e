"""A matcher of a few random weights, batches and rows of tiny pictures for it."""

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from pyarrow import Table, parquet
from torch.nn import functional as F

from cvmatch.data import images, manifest, schema
from cvmatch.match.augment import TowerInputs
from cvmatch.match.heads.branches import BranchHeads
from cvmatch.match.heads.joint import JointHeads
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.task import MatcherTask
from cvmatch.nn import rng
from cvmatch.nn.backbones import TowerSpec
from cvmatch.training import loop
from cvmatch.training.settings import TrainConfig

SIZE, HIGH, WIDE = 16, 8, 32


SPEC = TowerSpec(arch="vgg", layers=(4, "M", 8), grid=(2, 4), dim=12)


CONFIG = MatcherConfig(
    ground=SPEC,
    aerial=SPEC,
    mask=SPEC,
    panorama=(HIGH, WIDE),
    tile_size=SIZE,
    hidden=10,
    branches=("direct", "aerial", "layout"),
)


def network(seed: int = 0, **changes: Any) -> Matcher:
    """A matcher of branches, or with `score="joint"` of the published form."""
    torch.manual_seed(seed)
    model = Matcher(dataclasses.replace(CONFIG, **changes))
    if isinstance(model.heads, JointHeads):
        wake(model.heads)
    return model.eval()


def joint_heads(model: Matcher) -> JointHeads:
    assert isinstance(model.heads, JointHeads)
    return model.heads


def branch_heads(model: Matcher) -> BranchHeads:
    assert isinstance(model.heads, BranchHeads)
    return model.heads


def wake(heads: JointHeads) -> None:
    """Make nulls and weights as training leaves them; zeros would hide what is forgotten."""
    for null in (heads.null_ground, heads.null_synthetic, heads.null_mask):
        torch.nn.init.normal_(null)
    for layer in (heads.query_linear, heads.query_aerial_linear):
        torch.nn.init.normal_(layer.weight, std=0.3)


def rows(count, seed=0):
    """A batch as the training loop gives it."""
    random = torch.Generator().manual_seed(seed)

    def pixels(*shape):
        return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)

    return {
        "ground": pixels(count, 3, HIGH, WIDE),
        "aerial": pixels(count, 3, SIZE, SIZE),
        "synthetic": pixels(count, 3, SIZE, SIZE),
        "synthetic_mask": torch.randint(0, 5, (count, SIZE, SIZE), generator=random).byte(),
        "key": torch.tensor([rng.row_key(str(index)) for index in range(count)]),
        "epoch": torch.tensor(0),
    }


def views(batch):
    pictures = [batch[name].float() / 255 for name in ("ground", "aerial", "synthetic")]
    return TowerInputs(pictures[0], pictures[1], pictures[2], batch["synthetic_mask"])


def copy_of_a(heads: JointHeads) -> JointHeads:
    """Make both embeddings a code of A alone: the tile is never looked at."""
    g, a = heads.null_ground.numel(), heads.null_synthetic.numel()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.zero_()
        code = torch.randn(heads.hidden, a, generator=torch.Generator().manual_seed(3))
        heads.query_aerial_linear.weight.copy_(code)
        heads.query_linear.weight[:, g : g + a].copy_(code)  # a stands between g and s
    return heads


def joined(heads: JointHeads, synthetic, tile):
    """FFN_C as published: one linear layer over the concatenation [a; c]."""
    weight = torch.cat([heads.query_aerial_linear.weight, heads.tile_linear.weight], dim=1)
    first = F.linear(torch.cat([synthetic, tile]), weight, heads.query_aerial_linear.bias)
    rest = heads.candidate_mlp
    return F.normalize(first + rest.last(rest.middle(first.relu()).relu()), dim=0)


def task_of(model: Matcher, **changes: Any) -> MatcherTask:
    return MatcherTask(model, dataclasses.replace(TrainMatcher(augment=False), **changes))


def validate(task: MatcherTask, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """The summary of a validation of these rows, in batches as the training loop reads them."""
    parts = torch.arange(len(batch["key"])).split(loop.VALIDATION_BATCH)
    named = {name: value for name, value in batch.items() if name != "epoch"}
    batches = [{name: value[part] for name, value in named.items()} for part in parts]
    return task.summary(loop.evaluate(task, batches))


def row(pair_id="0000001", shade=128, error=None, **changes):
    ground = np.full((HIGH, WIDE, 3), shade, dtype=np.uint8)
    tile = np.full((SIZE, SIZE, 3), shade, dtype=np.uint8)
    whole = {
        schema.PAIR_ID: pair_id,
        schema.GROUND: images.encode(ground),
        schema.AERIAL: images.encode(tile),
        schema.CLASSES: None,
        schema.SYNTHETIC: images.encode(tile),
        schema.SYNTHETIC_CLASSES: images.encode(np.full((SIZE, SIZE), 2, dtype=np.uint8)),
        schema.LATITUDE: 1.0,
        schema.LONGITUDE: 2.0,
        schema.ERROR: error,
    }
    return whole | changes


def columns(*items):
    return {name: np.array([item[name] for item in items], dtype=object) for name in items[0]}


def synthesized_rows(directory, ids, towns=1):
    """Places that differ in their grey level, in three views; each in the next of `towns`."""
    shades = np.linspace(10, 245, len(ids)).astype(int)
    items = [
        row(name, shade=int(shade), latitude=0.01 * (number % towns) + 1e-6 * number)
        for number, (name, shade) in enumerate(zip(ids, shades, strict=True))
    ]
    items.append(row("broken", error="generate: ground: empty file", synthetic=None))
    os.makedirs(directory)
    table = Table.from_pylist(items, schema=schema.SYNTHESIZED)
    parquet.write_table(table, os.path.join(directory, "part-0.parquet"))
    fit = TrainConfig()
    manifest.write(directory, rows=len(items), config=fit, models={}, source="test")
    return directory
