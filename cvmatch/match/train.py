"""Train the matcher: synthesized pairs -> a published model that names its training ids."""

import dataclasses
import functools

from ray.data import Dataset
from ray.train import Result

from cvmatch import training
from cvmatch.data import manifest
from cvmatch.match.batches import decode, pair_ids, synthesized
from cvmatch.match.hard_negatives import mined
from cvmatch.match.model import JointFeatureLearningNet, MatcherConfig, View
from cvmatch.match.recipe import Recipe
from cvmatch.match.task import MatcherTask
from cvmatch.nn import backbones, rng
from cvmatch.runtime import session, tracking
from cvmatch.runtime.output_directory import made_from


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMatcher(Recipe):
    """Train the joint embedding on synthesized pairs."""

    pairs: str = "data/synthesized/train"
    """URI of the rows that jobs/synthesize.py wrote."""
    val: str = ""
    """URI of such rows for validation; empty: none."""
    tower: str = "vgg16"
    """Backbone of the towers: a torchvision model, or a local tower directory."""
    weights: str = ""
    """Local .safetensors or .pth file of its weights; empty: its own, or torchvision's hub."""
    grid: tuple[int, int] | None = None
    """Rows and columns of features that the head of a tower directory sees; None: its own."""
    dim: int | None = None
    """Width of that head; None: its own."""
    shared: bool = False
    """One tower for G, A and C, as Sample4Geo has it."""
    view: View = "polar"
    """What the towers of A, C and S see: the tile's polar view, or the tile as it is."""
    panorama: tuple[int, int] = (128, 512)
    """Height and width of G, in pixels."""
    polar: tuple[int, int] = (128, 512)
    """Height and width of the polar view, in pixels."""
    square: int = 256
    """Side to which tiles are decoded, in pixels."""
    hidden: int = 256
    """Width of the fusion layers, of the embeddings, and of the vector stored for each tile."""
    mine_every: int = 0
    """Epochs from one search for near pairs, which then share batches, to the next: near in space
    before the first epoch, then near for the model. 0: batches at random."""
    mine_pool: session.Pool = dataclasses.field(default_factory=lambda: session.Pool(batch=32))
    """Actors that embed the training pairs for that search."""
    output: str = "models/matcher"
    """Directory of the published model."""
    fit: training.Fit = dataclasses.field(default_factory=training.Fit)
    """The training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mine_every < 0:
            raise ValueError(f"train_matcher: expected mine_every >= 0, got {self.mine_every}.")
        if self.mine_every and "://" in self.fit.storage:
            raise ValueError(
                "train_matcher: the search for near pairs loads the model of the last checkpoint: "
                f"expected a fit.storage that all nodes mount with mine_every, got "
                f"{self.fit.storage!r}."
            )


def train(config: TrainMatcher) -> Result:
    """Train, publish the model to `config.output`, and log a run.

    Raises:
        FileNotFoundError: no synthesized rows there.
        ValueError: a backbone is not there, no row is without error, or validation pairs are
            among the training pairs.
    """
    training.preflight(config.fit)
    config = located(config)
    rows = synthesized(config.pairs, config.joint)
    decoded = functools.partial(_decoded, config)
    val = decoded(synthesized(config.val, config.joint)) if config.val else None
    ids = pair_ids(config.pairs)
    if config.val and (both := set(ids).intersection(pair_ids(config.val))):
        raise ValueError(
            f"train_matcher: expected validation pairs apart from training, got {len(both)} "
            f"in both {config.pairs} and {config.val}, such as {min(both)}. Pass another --val."
        )
    order = _order(config, rows) if config.mine_every else None
    with tracking.start("match", config) as run:
        build = functools.partial(build_task, config, ids)
        rows_of = manifest.digest([made_from(one) for one in (config.pairs, config.val) if one])
        result = training.fit(build, decoded(rows), val, config.fit, run, order, rows_of)
        training.publish(result, config.output)
    return result


def located(config: TrainMatcher) -> TrainMatcher:
    """The config with absolute local paths of the backbone: workers have another directory."""
    name, weights = backbones.located(config.tower, config.weights)
    return dataclasses.replace(config, tower=name, weights=weights)


def build_task(config: TrainMatcher, ids: tuple[str, ...] = ()) -> MatcherTask:
    """The task on its backbones; `ids` of the training pairs go into the model directory."""
    ground, aerial, classes = (_tower(config) for _ in range(3))
    model_config = MatcherConfig(
        ground=ground.spec,
        aerial=aerial.spec,
        classes=classes.spec,
        shared=config.shared,
        alone=not config.joint,
        view=config.view,
        panorama=config.panorama,
        polar=config.polar,
        square=config.square,
        hidden=config.hidden,
    )
    model = JointFeatureLearningNet(model_config, (ground, aerial, classes))
    return MatcherTask(model, config, ids, config.fit.seed)


def _order(config: TrainMatcher, rows: Dataset) -> training.Order:
    """The training rows, near ones together."""
    session.preflight(config.mine_pool)

    def nearby(model: str, epoch: int) -> Dataset:
        seed = rng.stream(config.fit.seed, epoch, "near") % 2**32
        return _decoded(config, mined(rows, model, config.mine_pool, seed))

    return training.Order(config.mine_every, nearby)


def _decoded(config: TrainMatcher, rows: Dataset) -> Dataset:
    return decode(rows, config.panorama, config.square)


def _tower(config: TrainMatcher) -> backbones.Tower:
    return backbones.tower(config.tower, config.weights, config.grid, config.dim)
