"""The settings of the demo's stages: small pictures and tiny base models, for a laptop."""

from dataclasses import dataclass

from cvmatch.config import override
from cvmatch.data.settings import Ingest, Validation
from cvmatch.demo import models as base_models
from cvmatch.demo.settings import Demo, MakeWorld
from cvmatch.evaluate.settings import Evaluate
from cvmatch.generate.settings import Conditioning, Generate, TrainGenerator
from cvmatch.index.settings import BuildIndex
from cvmatch.match.settings import TrainMatcher
from cvmatch.runtime.settings import Pool
from cvmatch.segment.settings import Segment, TrainSegmenter
from cvmatch.synthesize.settings import Synthesize
from cvmatch.training.settings import TrainConfig
from cvmatch.tune.settings import Tune

WIDTH = 256
"""Columns of the toy data sets' panoramas, at 64 rows."""

VIEW = (32, 128)
"""Height and width of what the matcher's towers see: a quarter of the cost of 64 x 256."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of each stage of the demo."""

    world: MakeWorld
    segmenter: TrainSegmenter
    generator: TrainGenerator
    synthesize: tuple[Synthesize, Synthesize]
    """Training pairs, held-out pairs."""
    tune: Tune
    trial: TrainMatcher
    """What all trials of the search share."""
    matcher: TrainMatcher
    index: BuildIndex
    evaluate: Evaluate


def make_plan(config: Demo) -> Plan:
    """Return the settings of the stages, all below `config.output`."""
    root, tiny = config.output, config.preset == "tiny"
    train, val = (Ingest(root=f"{root}/world", split=split) for split in ("train", "val"))

    def fit(name: str, epochs: int, batch: int, workers: int = 0) -> TrainConfig:
        return TrainConfig(
            epochs=1 if tiny else epochs,
            batch=4 if tiny else batch,
            workers=workers,
            seed=config.seed,
            storage=f"{root}/runs",
            name=name,
            cache=True,
        )

    matcher = TrainMatcher(
        pairs=f"{root}/synthesized/train",
        tower=base_models.TOWER,
        panorama=VIEW,
        tile_size=64,
        hidden=128,
        grid=(4, 16),
        lr_towers=1e-3,
        lr_heads=1e-3,
        output=f"{root}/models/matcher",
        fit=fit("matcher", 22, 32, config.workers),
    )
    return Plan(
        world=MakeWorld(output=f"{root}/world", preset=config.preset, seed=config.seed),
        segmenter=TrainSegmenter(
            data=train,
            val=Validation(root=val.root),
            base=base_models.SEGFORMER,
            size=128,
            lr=1e-3,
            lr_head=3e-3,
            dice_weight=0.5,
            output=f"{root}/models/segmenter",
            fit=fit("segmenter", 2, 8),
        ),
        generator=TrainGenerator(
            data=train,
            val=Validation(root=val.root, limit=128),  # each row costs six passes of the UNet
            diffusion=base_models.DIFFUSION,
            clip=base_models.CLIP,
            lpips_vgg=base_models.TOWER,
            conditioning=Conditioning(panorama_width=WIDTH),
            bev_nce_weight=0.2,
            x0_nce_weight=0.1,
            train_unet="attention",
            ema_decay=0.95,  # docs/decisions.md#ema-of-the-demo
            mirror=True,
            lr=3.5e-4,
            lr_conditioner=2e-3,
            pretrain_bev=1 if tiny else 6,
            latent_cache=f"{root}/latents",
            output=f"{root}/models/generator",
            fit=fit("generator", 5, 32),
        ),
        synthesize=(
            _make_synthesize(root, tiny, train),
            _make_synthesize(root, tiny, val),
        ),
        tune=_make_tune(root, tiny, config.seed),
        # A trial is a process of its own, and is compared by validation.
        trial=override(matcher, {"fit.workers": 0, "val": f"{root}/synthesized/val"}),
        matcher=matcher,
        index=BuildIndex(
            tiles=val,
            model=f"{root}/models/matcher",
            queries=f"{root}/synthesized/val",
            output=f"{root}/index",
            pool=Pool(batch=32, cpus=1),
            seed=config.seed,
        ),
        evaluate=Evaluate(
            queries=f"{root}/synthesized/val",
            index=f"{root}/index",
            output=f"{root}/evaluation",
            seed=config.seed,
        ),
    )


def _make_synthesize(root: str, tiny: bool, data: Ingest) -> Synthesize:
    return Synthesize(
        data=data,
        generate=Generate(
            model=f"{root}/models/generator",
            pool=Pool(size=1 if tiny else 2, batch=16, calls=2),
        ),
        segment=Segment(model=f"{root}/models/segmenter", pool=Pool(batch=16, calls=2)),
        output=f"{root}/synthesized/{data.split}",
    )


def _make_tune(root: str, tiny: bool, seed: int) -> Tune:
    return Tune(
        stage="matcher",
        space=base_models.SPACE,
        trials=2 if tiny else 3,
        concurrent=3,
        epochs=1,
        storage=f"{root}/runs",
        name="tune",
        output=f"{root}/tuned",
        seed=seed,
    )
