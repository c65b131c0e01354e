"""Published weights of Sample4Geo -> a matcher directory that gives the same vectors.

Sample4Geo (Deuser, Habel and Oswald 2023) is one backbone of timm for panoramas and tiles, whose
pooled features, scaled to unit norm, are the vectors. Pictures are resized by OpenCV's
INTER_LINEAR_EXACT (`images.LINEAR_EXACT`) and normalised as timm says of the backbone.
"""

import logging
import os
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from pyarrow import fs
from torch import Tensor

from cvmatch.data import images, storage
from cvmatch.data.layouts import find as layouts
from cvmatch.match.exchange.directory import require_replaceable
from cvmatch.match.exchange.settings import SAMPLE4GEO_DATA, ImportSample4Geo
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.task import write_training_data, write_training_ids
from cvmatch.nn import backbones, hub
from cvmatch.training.checkpoints import copy_tree

CVUSA_PAIRS = 35_532
"""Pairs of the official training split of CVUSA."""

_FLAG = "import sample4geo"
_WRAPPER = "module."  # of DataParallel
_BACKBONE = "model."
_OTHERS = {"logit_scale"}  # the temperature of its loss, which no vector depends on

_log = logging.getLogger(__name__)


class Imported(NamedTuple):
    """What was made of the weights."""

    output: str
    width: int
    """Numbers of a vector."""
    parameters: int
    training_ids: int | None
    """Pairs that an evaluation refuses; None: they are not known."""


def import_sample4geo(config: ImportSample4Geo) -> Imported:
    """Write the matcher of published weights to `config.output`.

    Raises:
        ValueError: the weights are no state dict, or not of this backbone; there is no such
            backbone or data set; or the output holds something else.
    """
    require_replaceable(config.output, "--output")
    ids = _read_training_ids(config) if config.trained_on else None
    model = build_matcher(config, read_weights(config.weights))
    with tempfile.TemporaryDirectory() as aside:
        model.save(aside)
        if ids is None:
            write_training_data(aside, config.data)
            _log.warning(
                "%s: which pairs it was trained on is not known (%s): evaluations cannot refuse "
                "them. Pass the data set with --trained-on.",
                config.output,
                config.data,
            )
        else:
            write_training_ids(aside, ids, config.data)
        copy_tree(fs.LocalFileSystem(), aside, storage.absolute(config.output).rstrip("/"))
    parameters = sum(weight.numel() for weight in model.parameters())
    known = None if ids is None else len(ids)
    return Imported(config.output, model.config.width, parameters, known)


def read_weights(path: str) -> Mapping[str, Tensor]:
    """Read the weights of the backbone by timm's names; nothing is unpickled.

    Raises:
        ValueError: there is no such file, it holds something else than a state dict, or names
            that are not of Sample4Geo's form.
    """
    if not os.path.isfile(path):
        raise ValueError(
            f"{_FLAG}: expected a file of weights (.pth), got {path!r}, where there is none. "
            "Download Sample4Geo's published weights, and pass the file."
        )
    state = {
        name.removeprefix(_WRAPPER): value for name, value in hub.read_state(path, _FLAG).items()
    }
    strange = sorted(name for name in {*state} - _OTHERS if not name.startswith(_BACKBONE))
    if strange or not {*state} - _OTHERS:
        raise ValueError(
            f"{_FLAG} {path}: expected names that begin with {_BACKBONE!r} (the backbone), and "
            f"{sorted(_OTHERS)}, got {len(strange)} others of {len(state)}, such as {strange[:3]}. "
            "These are not weights that Sample4Geo saved; for a backbone alone, see --tower and "
            "--weights of cvmatch train-matcher."
        )
    return {
        name.removeprefix(_BACKBONE): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name.startswith(_BACKBONE)
    }


def build_matcher(config: ImportSample4Geo, state: Mapping[str, Tensor]) -> Matcher:
    """Build the matcher of a backbone's weights, in evaluation mode.

    Raises:
        ValueError: they are not those of `config.tower`, or timm has no such backbone.
    """
    if not config.tower.startswith(backbones.TIMM):
        raise ValueError(
            f"{_FLAG}: expected a --tower of timm, such as {ImportSample4Geo.tower}, got "
            f"{config.tower!r}. Sample4Geo's backbones are timm's."
        )
    tower = backbones.load_tower(config.tower, backbones.RANDOM)
    _check_weights(config, state, tower.net.state_dict())
    tower.net.load_state_dict(state)
    shape = MatcherConfig(
        branches=("direct",),
        shared=True,
        projection="square",
        panorama=config.panorama,
        tile_size=config.tile_size,
        hidden=tower.dim,
        head="none",
        preprocess=images.LINEAR_EXACT,
        ground=tower.spec,
        aerial=tower.spec,
        mask=tower.spec,
    )
    return Matcher(shape, (tower, tower, tower)).eval()


def _check_weights(
    config: ImportSample4Geo, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    lacking = sorted(set(expected) - set(state))
    strange = sorted(set(state) - set(expected))
    other = [
        f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if not (lacking or strange or other):
        return
    counts = {"lack": lacking, "are not of it": strange, "have another shape": other}
    found = "; ".join(f"{len(some)} {what}: {some[:3]}" for what, some in counts.items() if some)
    raise ValueError(
        f"{_FLAG} {config.weights}: expected the {len(expected)} weights of {config.tower}, got "
        f"{len(state)}, of which {found}. Pass the backbone that was trained with --tower "
        "timm:NAME; timm.list_models() names them."
    )


def _read_training_ids(config: ImportSample4Geo) -> list[str]:
    """Read the ids of a data set's training split from its table, without its pictures."""
    layout = layouts.find(config.trained_on)
    if "train" not in layout.tables:
        raise ValueError(
            f"{_FLAG}: expected {layout.name_table('train')} in {layout.root}, which lists the "
            f"training split, got {list(layout.tables.values())}. Pass another --trained-on."
        )
    ids = sorted(row.pair_id for row in layout.read_rows("train") if row.pair_id)
    if config.data == SAMPLE4GEO_DATA and len(ids) != CVUSA_PAIRS:
        _log.warning(
            "%s: expected the %d training pairs of official CVUSA, got %d: pairs that it lacks "
            "were trained on, too, and are not refused",
            layout.root,
            CVUSA_PAIRS,
            len(ids),
        )
    return ids
