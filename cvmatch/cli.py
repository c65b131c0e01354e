"""The command `cvmatch`: which commands there are, what each runs, and how each ends.

Nothing heavy is imported before a command runs: its help needs its settings alone.
"""

import dataclasses
import importlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C (128 + SIGINT), as shells have it."""

FAILED = 1
"""Exit code of a job that ended before its output was whole, by a defect or by the cluster."""

WRONG_INPUT = 2
"""Exit code of a wrong flag, file or data set."""

_RAY_COPY = "runtime_resources/working_dir_files"
"""In the path of the directory in which Ray runs a submitted job."""

_OUTPUTS = ("output", "storage", "latent_cache", "page")
"""Names of settings that say where something is written."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command, and what it needs before anything heavy is imported."""

    name: str
    """As it is typed; `index` and `import` have subcommands."""
    help: str
    """One line."""
    settings: str
    """`module:class` of its settings."""
    run: Callable[[Any], Any]
    """Does it with the settings. Returns what is printed as one line of JSON; None: nothing."""
    kept: Callable[[Any], str]
    """What is there after Ctrl-C, and how to go on, in a sentence."""
    level: int = logging.INFO
    """Of the log on stderr."""


def main(command: str = "", argv: Sequence[str] | None = None) -> None:
    """Run a command of the command line; `command` is one that is not typed (as in jobs/).

    Raises:
        SystemExit: help was asked for (0), it failed (1), input is wrong (2), or Ctrl-C was pressed
            (130). The last line on stderr is the reason.
    """
    words = [*command.split(), *(sys.argv[1:] if argv is None else argv)]
    chosen = {one.name: one for one in COMMANDS if words[: _length(one)] == one.name.split()}
    if not chosen:
        _show_commands(words)
    (one,) = chosen.values()
    config = None
    try:
        config = _parse(one, words[_length(one) :])
        _run(one, config)
    except KeyboardInterrupt:
        kept = one.kept(config) if config is not None else "Nothing was begun."
        _exit(INTERRUPTED, f"cvmatch {one.name}: interrupted. {kept}")
    except Exception as error:  # noqa: BLE001 (whatever ends a job, its last line says so)
        if is_wrong_input(error):
            _exit(WRONG_INPUT, f"cvmatch {one.name}: {error}")
        traceback.print_exception(error)
        kept = f" {one.kept(config)}" if config is not None else ""
        _exit(FAILED, f"cvmatch {one.name}: failed: {_describe(error)}.{kept}")


def to_json(value: Any) -> str:
    """Return a line of JSON; infinities and NaN, which it has no word for, are null."""
    from cvmatch.data import storage

    return json.dumps(storage.replace_non_finite(value), allow_nan=False)


def settings_of(command: Command) -> type:
    """Import the class of a command's settings."""
    module, name = command.settings.split(":")
    return getattr(importlib.import_module(module), name)


def _parse(command: Command, words: Sequence[str]) -> Any:
    from cvmatch import config

    return config.parse(settings_of(command), list(words), prog=f"cvmatch {command.name}")


def _run(command: Command, config: Any) -> None:
    from cvmatch.runtime import progress
    from cvmatch.runtime.settings import DryRun

    progress.to_console(command.level)
    _require_lasting_outputs(config)
    try:
        answer = command.run(config)
    except DryRun as plan:
        print(plan)
        return
    if answer is not None:
        print(to_json(answer))


def _require_lasting_outputs(config: Any) -> None:
    """Check that what is written outlives a job that runs in Ray's copy of a directory.

    Raises:
        ValueError: it does not; names the flag.
    """
    from cvmatch import config as configs
    from cvmatch.data import storage

    if _RAY_COPY in str(Path.cwd()):
        for name, value in configs.flat(config).items():
            written = name.rpartition(".")[2] in _OUTPUTS and value
            if written and storage.absolute(str(value)) != value:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected an absolute path or a URI, got "
                    f"{value!r}: this job runs in Ray's own copy of the working directory, which "
                    "goes when it ends, and what it writes there too."
                )


def _describe(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of an error in another process, Ray puts its traceback before what it says.
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}".rstrip(".")


def is_wrong_input(error: Exception) -> bool:
    """Whether an error says what is wrong with the input: raised here on purpose, or a file is
    missing. All others are defects, which need their traceback."""
    if isinstance(error, FileNotFoundError):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(frame.filename).is_relative_to(Path(__file__).parent)
    raised = (frame.line or "").lstrip().startswith("raise ")
    return isinstance(error, ValueError | RuntimeError) and inside and raised


def _length(command: Command) -> int:
    return len(command.name.split())


def _show_commands(words: list[str]) -> NoReturn:
    """Print the commands; an error unless help was asked for."""
    begins = [one for one in COMMANDS if words and one.name.split()[0] == words[0]]
    shown = begins or COMMANDS
    rest = words[1:] if begins else words
    title = f"cvmatch {words[0]}" if begins else "cvmatch"
    if rest and rest[0] not in ("-h", "--help"):
        first = f"{words[0]} " if begins else ""
        names = ", ".join(one.name.removeprefix(first) for one in shown)
        _exit(WRONG_INPUT, f"{title}: expected one of {names}; got {rest[0]!r}.")
    width = max(len(one.name) for one in COMMANDS)
    print(f"usage: {title} COMMAND [--config FILE] [flags]\n")
    if not begins:
        print("Find the satellite tile of a street panorama. In the order of the pipeline:\n")
    for one in shown:
        print(f"  {one.name:{width}}  {one.help}")
    print(f"\nFlags of one: {title} COMMAND --help")
    sys.exit(0)


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _train_segmenter(config: Any) -> Any:
    from cvmatch.segment.train import train

    return _train(train, config)


def _train_generator(config: Any) -> Any:
    from cvmatch.generate.train import train

    return _train(train, config)


def _train_matcher(config: Any) -> Any:
    from cvmatch.match.train import train

    return _train(train, config)


def _train(train: Callable[[Any], Any], config: Any) -> Any:
    return {"model": config.output, **train(config).metrics}


def _synthesize(config: Any) -> Any:
    from cvmatch.synthesize.run import synthesize

    manifest = synthesize(config)
    return {"output": config.output, "rows": manifest["rows"], "models": manifest["models"]}


def _import_sample4geo(config: Any) -> Any:
    from cvmatch.match.exchange.sample4geo import import_sample4geo

    return import_sample4geo(config)._asdict()


def _pairs(config: Any) -> Any:
    from cvmatch.gallery import require_geo

    require_geo()
    from cvmatch.gallery.pairs import make_pairs

    return {"output": config.output, **make_pairs(config)}


def _gallery(config: Any) -> Any:
    from cvmatch.gallery import require_geo

    require_geo()
    from cvmatch.gallery.run import Counts, make_gallery

    manifest = make_gallery(config)
    found = manifest["config"]["counts"]
    print(Counts.read(found).describe(config.metres), file=sys.stderr)
    return {"output": config.output, "rows": manifest["rows"], **found}


def _build_index(config: Any) -> Any:
    from cvmatch.index.build import build

    plain = build(config).plain()
    shown = ("version", "rows", "width", "ann", "shortlist", "recall", "rejected")
    return {"index": config.output, **{name: plain[name] for name in shown}}


def _index_info(config: Any) -> Any:
    from cvmatch.index.verify import read_info

    return read_info(config).summary()


def _index_verify(config: Any) -> Any:
    from cvmatch.index.verify import verify

    return dataclasses.asdict(verify(config))


def _index_add(config: Any) -> Any:
    from cvmatch.index.update import add

    return add(config).summary()


def _index_delete(config: Any) -> Any:
    from cvmatch.index.update import delete

    result = delete(config)
    return {**result.manifest.summary(), "missing": result.missing}


def _index_compact(config: Any) -> Any:
    from cvmatch.index.embedding import ray_map
    from cvmatch.index.update import compact

    return compact(config, ray_map(config.output)).summary()


def _index_vacuum(config: Any) -> Any:
    from cvmatch.index.update import vacuum

    return dataclasses.asdict(vacuum(config))


def _evaluate(config: Any) -> Any:
    from cvmatch.data import storage
    from cvmatch.evaluate.run import evaluate
    from cvmatch.report.evaluation_page import write_evaluation_page
    from cvmatch.report.scores import collect_scores, format_table

    results = evaluate(config).to_json()
    page = write_evaluation_page(config.output, config.queries, config.seed)
    print(format_table(collect_scores(results), "Evaluation"), file=sys.stderr)
    print(f"page  {storage.absolute(page)}", file=sys.stderr)
    return results


def _open_in_browser(page: str) -> None:
    import webbrowser

    from cvmatch.data import storage

    location = storage.absolute(page)
    webbrowser.open(location if "://" in location else f"file://{location}")


def _search(config: Any) -> None:
    from cvmatch.report.search_page import write_search_page
    from cvmatch.search.files import search_files

    results = []
    for result in search_files(config):
        for tile in result.tiles:
            print(to_json(tile))
        results.append(result)
    if page := config.page or ("search.html" if config.open else ""):
        write_search_page(results, page, config.tiles)
        if config.open:
            _open_in_browser(page)


def _locate(config: Any) -> None:
    from cvmatch.data import storage
    from cvmatch.search import places
    from cvmatch.search.files import search_files

    results = []
    for result in search_files(config):
        print(places.to_text(result), flush=True)
        results.append(result)
    for location, write in (
        (config.geojson, places.to_geojson),
        (config.kml, places.to_kml),
        (config.csv, places.to_csv),
    ):
        if location:
            storage.write_text(location, write(results))
    if page := config.page or ("found.html" if config.open else ""):
        from cvmatch.report.map_page import write_map_page

        write_map_page(results, page, config.tiles, config.basemap, config.attribution)
        if config.open:
            _open_in_browser(page)


def _search_rows(config: Any) -> Any:
    from cvmatch.search.rows import search_rows

    return {"output": config.output, "rows": search_rows(config)["rows"]}


def _tune(config: Any) -> Any:
    from cvmatch.tune.run import search

    result = search(config)
    best = {"params": result.params, result.metric: result.value, "trials": len(result.trials)}
    file = f"{config.output}/best.yaml"
    print(f"train the best  cvmatch train-{config.stage} --config {file}", file=sys.stderr)
    return {"output": config.output, **best}


def _demo(config: Any) -> None:
    from cvmatch.demo.run import run

    print(run(config))


def _demo_data(config: Any) -> Any:
    from cvmatch.demo.procedural.write import make_world

    return make_world(config)


def _training_kept(config: Any) -> str:
    fit = config.fit
    if not fit.name:
        return (
            f"Its checkpoints are below {fit.storage}; --fit.name and the name of its "
            "directory there go on."
        )
    return f"The same command goes on from the last checkpoint of {fit.storage}/{fit.name}."


def _rows_kept(config: Any) -> str:
    return f"Finished rows are in {config.output}; the same command goes on."


def _index_kept(config: Any) -> str:
    return f"No version was published in {config.output}; the same command goes on."


def _tune_kept(config: Any) -> str:
    if not config.name:
        return f"Finished trials are below {config.storage}; --name and its name there go on."
    return f"Finished trials are in {config.storage}/{config.name}; the same command goes on."


def _output_kept(config: Any) -> str:
    return f"What is finished is in {config.output}; the same command goes on."


def _nothing_kept(_: Any) -> str:
    return "Nothing was kept or changed; give the same command again."


COMMANDS = (
    Command(
        name="train-segmenter",
        help="fine-tune the segmenter on tiles and class maps",
        settings="cvmatch.segment.settings:TrainSegmenter",
        run=_train_segmenter,
        kept=_training_kept,
    ),
    Command(
        name="train-generator",
        help="fine-tune the generator, which paints an aerial picture from a panorama",
        settings="cvmatch.generate.settings:TrainGenerator",
        run=_train_generator,
        kept=_training_kept,
    ),
    Command(
        name="synthesize",
        help="paint and segment the synthetic aerial of every pair of a split",
        settings="cvmatch.synthesize.settings:Synthesize",
        run=_synthesize,
        kept=_rows_kept,
    ),
    Command(
        name="train-matcher",
        help="train the matcher on synthesized pairs",
        settings="cvmatch.match.settings:TrainMatcher",
        run=_train_matcher,
        kept=_training_kept,
    ),
    Command(
        name="import sample4geo",
        help="make a matcher of Sample4Geo's published weights",
        settings="cvmatch.match.exchange.settings:ImportSample4Geo",
        run=_import_sample4geo,
        kept=_nothing_kept,
    ),
    Command(
        name="gallery",
        help="cut imagery (map tiles, PMTiles, GeoTIFF) into the tiles of a gallery",
        settings="cvmatch.gallery.settings:MakeGallery",
        run=_gallery,
        kept=_rows_kept,
    ),
    Command(
        name="pairs",
        help="cut the tiles of photos out of imagery, as pairs to train on",
        settings="cvmatch.gallery.settings:MakePairs",
        run=_pairs,
        kept=_rows_kept,
    ),
    Command(
        name="build-index",
        help="embed all tiles of a gallery and publish them as an index",
        settings="cvmatch.index.settings:BuildIndex",
        run=_build_index,
        kept=_index_kept,
    ),
    Command(
        name="index info",
        help="show what the manifest of an index says",
        settings="cvmatch.index.settings:Info",
        run=_index_info,
        kept=_nothing_kept,
    ),
    Command(
        name="index verify",
        help="check the files of an index; --deep also embeds stored tiles again",
        settings="cvmatch.index.settings:Verify",
        run=_index_verify,
        kept=_nothing_kept,
    ),
    Command(
        name="index add",
        help="add tiles to an index",
        settings="cvmatch.index.settings:AddTiles",
        run=_index_add,
        kept=_index_kept,
    ),
    Command(
        name="index delete",
        help="delete tiles from an index",
        settings="cvmatch.index.settings:DeleteTiles",
        run=_index_delete,
        kept=_index_kept,
    ),
    Command(
        name="index compact",
        help="merge what was added to an index and drop what was deleted",
        settings="cvmatch.index.settings:Compact",
        run=_index_compact,
        kept=_index_kept,
    ),
    Command(
        name="index vacuum",
        help="delete old versions of an index, and files that no version names",
        settings="cvmatch.index.settings:Vacuum",
        run=_index_vacuum,
        kept=lambda config: f"Some files of old versions of {config.output} may be left.",
    ),
    Command(
        name="evaluate",
        help="measure a matcher, its index and the models behind its queries, on unseen pairs",
        settings="cvmatch.evaluate.settings:Evaluate",
        run=_evaluate,
        kept=_nothing_kept,
    ),
    Command(
        name="locate",
        help="find the places of photos: text, GeoJSON, KML, CSV, a map",
        settings="cvmatch.search.settings:LocatePhotos",
        run=_locate,
        kept=_nothing_kept,
        level=logging.ERROR,
    ),
    Command(
        name="search",
        help="find the tiles of panoramas; prints JSON lines",
        settings="cvmatch.search.settings:SearchFiles",
        run=_search,
        kept=_nothing_kept,
        level=logging.WARNING,
    ),
    Command(
        name="search-rows",
        help="find the tiles of all rows of a synthesized data set, on a cluster",
        settings="cvmatch.search.settings:SearchRows",
        run=_search_rows,
        kept=_rows_kept,
    ),
    Command(
        name="tune",
        help="search the settings of a training",
        settings="cvmatch.tune.settings:Tune",
        run=_tune,
        kept=_tune_kept,
    ),
    Command(
        name="demo",
        help="run the whole pipeline on an embedded data set",
        settings="cvmatch.demo.settings:Demo",
        run=_demo,
        kept=_output_kept,
    ),
    Command(
        name="demo-data",
        help="write the embedded data set in CVUSA's layout",
        settings="cvmatch.demo.settings:MakeWorld",
        run=_demo_data,
        kept=_nothing_kept,
    ),
)
"""All commands, in the order of the pipeline."""


if __name__ == "__main__":
    main()
