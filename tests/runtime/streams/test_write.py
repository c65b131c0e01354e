"""Every job that makes rows writes what a plain loop over them makes, each once, or says why not.

A job is tried on rows of which none, some and all fail.
"""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cvmatch.data import schema, storage, tables
from cvmatch.data.pairs import FILES, PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.demo import models as base_models
from cvmatch.generate.batches import LATENT_ROWS
from cvmatch.generate.encoders import read_sizes
from cvmatch.generate.infer import GenerateAerial
from cvmatch.generate.latent_cache import EncodePairs, cache_latents
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Encode, Generate
from cvmatch.index import embedding
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import GalleryConfig
from cvmatch.match.infer import EmbedQuery, EmbedTile
from cvmatch.runtime import lease
from cvmatch.runtime.settings import DryRun, Pool
from cvmatch.search.rows import search_rows
from cvmatch.search.settings import SearchRows
from cvmatch.segment.batches import Preprocess
from cvmatch.segment.infer import SegmentAerial
from cvmatch.segment.model import Segmenter
from cvmatch.segment.settings import Segment
from cvmatch.synthesize.run import synthesize
from cvmatch.synthesize.settings import Synthesize
from tests.helpers import index as tiny

pytestmark = pytest.mark.ray

ROWS = 6
BROKEN = b"no picture"

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One that makes rows of the pictures in `column`."""

    column: str
    run: Callable[..., str]
    """Returns the directory that it wrote; takes changes of settings."""
    state: Callable[[Row], Row]
    """Makes one row, without Ray."""
    names: tuple[str, ...]
    """Columns that are compared, beside `pair_id` and `error`."""


@pytest.fixture(scope="module")
def models(tmp_path_factory, ray_session) -> Path:
    at = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    conditioning = Conditioning(panorama_width=256)
    Generator.base(base_models.DIFFUSION, base_models.CLIP, conditioning).save(f"{at}/generator")
    Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=64)).save(f"{at}/segmenter")
    tiny.index(str(at))
    return at


class Pairs:
    """A copy of the first pairs of the tiny world, whose pictures have been checked."""

    def __init__(self, world_root: str, folder: Path) -> None:
        root = folder / "world"
        shutil.copytree(world_root, root, ignore=shutil.ignore_patterns(".cvmatch"))
        self.data = Ingest(root=str(root), block=2, limit=ROWS, max_rejected=1.0)
        PairDataset.open(self.data)
        self.plan = root / ".cvmatch" / f"train-{ROWS}" / "pairs.parquet"

    def rows(self) -> list[Row]:
        planned = pq.read_table(self.plan).to_pylist()
        return [self._row(one) for one in sorted(planned, key=lambda one: one["pair_id"])]

    def _row(self, one: Row) -> Row:
        root = Path(self.data.root)
        files = {column: one[name] for column, name in FILES.items()}
        pictures = {
            column: (root / name).read_bytes() if name else None for column, name in files.items()
        }
        return {
            schema.PAIR_ID: one["pair_id"],
            **pictures,
            schema.LATITUDE: one["latitude"],
            schema.LONGITUDE: one["longitude"],
            schema.ERROR: None,
        }

    def spoil(self, column: str, count: int) -> None:
        for one in pq.read_table(self.plan).to_pylist()[:count]:
            file = Path(self.data.root) / one[FILES[column]]
            file.write_bytes(BROKEN.ljust(file.stat().st_size))  # which is what ingest looks at

    def mend(self, world_root: str) -> None:
        shutil.copytree(world_root, self.data.root, dirs_exist_ok=True)

    def double(self) -> None:
        rows = pq.read_table(self.plan)
        pq.write_table(pa.concat_tables([rows[:-1], rows[:1]]), self.plan)


class Synthesized:
    """Synthesized rows of random pictures."""

    def __init__(self, folder: Path) -> None:
        self.table = tiny.rows(ROWS)
        self.location = tiny.write(self.table, str(folder / "synthesized"))

    def rows(self) -> list[Row]:
        return sorted(self.table.to_pylist(), key=lambda one: one["pair_id"])

    def spoil(self, column: str, count: int) -> None:
        at = self.table.column_names.index(column)
        good = self.table[column].to_pylist()
        column_ = pa.array([BROKEN] * count + good[count:], pa.binary())
        self._write(self.table.set_column(at, column, column_))

    def double(self) -> None:
        self._write(pa.concat_tables([self.table[:-1], self.table[:1]]))

    def _write(self, table: pa.Table) -> None:
        self.table = table
        pq.write_table(table, f"{self.location}/part-0.parquet")  # the manifest stays as it was


def batch_of(row: Row) -> dict[str, np.ndarray]:
    columns = {}
    for name, value in row.items():
        columns[name] = np.empty(1, dtype=object)
        columns[name][0] = value
    return columns


def _synthesize(models: Path, pairs: Pairs, output: str) -> Job:
    config = Synthesize(
        data=pairs.data,
        generate=Generate(model=f"{models}/generator", num_inference_steps=2, pool=Pool(batch=4)),
        segment=Segment(model=f"{models}/segmenter", pool=Pool(batch=4)),
        output=output,
        max_rejected=1.0,
    )
    draw = GenerateAerial(config.generate.model, config.generate, batch=4)
    label = SegmentAerial(config.segment.model, batch=4)

    def state(row: Row) -> Row:
        return {name: values[0] for name, values in label(draw(batch_of(row))).items()}

    def run(**changes: Any) -> str:
        synthesize(replace(config, **changes))
        return output

    return Job(schema.GROUND, run, state, tuple(schema.SYNTHESIZED.names[1:-1]))


def _encode(_: Path, pairs: Pairs, output: str) -> Job:
    config = Encode(
        data=pairs.data,
        diffusion=str(base_models.DIFFUSION),
        clip=str(base_models.CLIP),
        conditioning=Conditioning(panorama_width=256),
        latent_cache=output,
    )
    actor = EncodePairs(config, read_sizes(config.diffusion, config.clip, 256))
    names = tuple(LATENT_ROWS.names[1:-1])
    return Job(
        schema.GROUND,
        lambda: cache_latents(config, pool=Pool(batch=1)),
        lambda row: actor(batch_of(row)).to_pylist()[0],
        names,
    )


def _embed(models: Path, pairs: Pairs, output: str) -> Job:
    config = GalleryConfig(
        tiles=replace(pairs.data, cache=""), output=output, pool=Pool(batch=4), max_rejected=1.0
    )
    actor = EmbedTile(f"{models}/model", 4)

    def state(row: Row) -> Row:
        return {name: values[0] for name, values in actor(batch_of(row)).items()}

    def run() -> str:
        return embedding.embed_gallery(config, f"{models}/model", {"tiles": "some", "of": (1, 2)})[
            0
        ]

    return Job(schema.AERIAL, run, state, (schema.LATITUDE, schema.LONGITUDE, "tile_vector"))


def _search(models: Path, made: Synthesized, output: str) -> Job:
    index = Index.open(f"{models}/index")
    embed = EmbedQuery(index.matcher_dir, "G+A+S")
    config = SearchRows(
        rows=made.location,
        index=f"{models}/index",
        output=output,
        top_k=4,
        embed=Pool(batch=1),  # the last bits depend on it
        rank=Pool(batch=1),
    )

    def state(row: Row) -> Row:
        batch = embed(batch_of(row))
        error = batch[schema.ERROR][0]
        ranked = rank(index, torch.from_numpy(batch["query_vector"]).to(index.device), top_k=4)
        tiles = [] if error else [f"{number:07d}" for number in ranked.rows[0]]
        scores = [] if error else ranked.scores[0].tolist()
        return {
            schema.PAIR_ID: row[schema.PAIR_ID],
            "tiles": tiles,
            "scores": scores,
            schema.ERROR: error,
        }

    def run() -> str:
        search_rows(config)
        return output

    return Job(schema.GROUND, run, state, ("tiles", "scores"))


JOBS = {"synthesize": _synthesize, "encode": _encode, "embed": _embed, "search_rows": _search}


@pytest.fixture(params=JOBS)
def tried(request, models, world_root, tmp_path):
    """A job, and the rows that it is to read."""
    inputs = (
        Synthesized(tmp_path) if request.param == "search_rows" else Pairs(world_root, tmp_path)
    )
    return JOBS[request.param](models, inputs, str(tmp_path / "output")), inputs


def written(output: str, names: tuple[str, ...]) -> list[Row]:
    columns = [schema.PAIR_ID, *names, schema.ERROR]
    rows = itertools.chain(*(one.to_pylist() for one in tables.batches(output, columns)))
    return sorted(rows, key=lambda row: row[schema.PAIR_ID])


def plain(row: Row) -> Row:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in row.items()
    }


@pytest.mark.parametrize("failing", [0, 2])
def test_job_writes_what_a_plain_loop_makes(tried, failing):
    job, inputs = tried
    inputs.spoil(job.column, failing)
    output = job.run()
    expected = [job.state(row) for row in inputs.rows()]
    found = written(output, job.names)
    assert len(found) == ROWS
    for one, other in zip(found, expected, strict=True):
        assert plain(one) == plain({name: other[name] for name in one})
    assert sum(row[schema.ERROR] is not None for row in found) == failing
    rejected = storage.read_text(storage.join(output, "rejected.jsonl")).splitlines()
    assert len(rejected) == failing


def test_job_whose_rows_all_fail_ends_in_an_error(tried):
    job, inputs = tried
    inputs.spoil(job.column, ROWS)
    with pytest.raises(ValueError, match=rf"all {ROWS} failed, .*rejected\.jsonl"):
        job.run()


def test_job_with_a_row_twice_in_the_place_of_another_is_refused(tried):
    job, inputs = tried
    inputs.double()
    with pytest.raises(ValueError, match=rf"of {ROWS - 1} ids, some are there twice"):
        job.run()


@pytest.mark.parametrize("before", ["complete", "ended by too many failures"])
def test_failed_rows_are_made_again_and_the_others_stay(models, world_root, tmp_path, before):
    pairs = Pairs(world_root, tmp_path)
    job = _synthesize(models, pairs, str(tmp_path / "output"))
    pairs.spoil(job.column, 2)
    if before == "complete":
        output = job.run()
    else:
        with pytest.raises(ValueError, match="--retry-rejected"):
            job.run(max_rejected=0.1)
        output = str(tmp_path / "output")
    pairs.mend(world_root)
    job.run(retry_rejected=True)
    found = written(output, job.names)
    expected = [job.state(row) for row in pairs.rows()]
    assert [plain(row) for row in found] == [
        plain({name: row[name] for name in found[0]}) for row in expected
    ]
    assert storage.read_text(storage.join(output, "rejected.jsonl")) == ""


def test_second_job_of_an_output_is_refused_at_once(models, world_root, tmp_path):
    pairs = Pairs(world_root, tmp_path)
    job = _synthesize(models, pairs, str(tmp_path / "output"))
    with lease.hold(str(tmp_path / "output")), pytest.raises(ValueError, match="no other job"):
        job.run()
    job.run()


def test_dry_run_says_what_would_be_done_and_writes_nothing(models, world_root, tmp_path):
    pairs = Pairs(world_root, tmp_path)
    job = _synthesize(models, pairs, str(tmp_path / "output"))
    with pytest.raises(DryRun, match=rf"synthesize: {ROWS} rows into") as plan:
        job.run(dry_run=True)
    assert "generate.pool: 1 actors of 0.5 CPUs, on 1 nodes" in str(plan.value)
    assert not (tmp_path / "output").exists()
