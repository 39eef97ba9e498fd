"""The demo model in every contestant's format, at every size and calibrated: its rows in the results."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from nfq_core.calibration.statistics import Calibration
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.decibels import sqnr_db
from nfq_core.demo.calibrate import CALIBRATION_SEED, HELD_OUT_SEED
from nfq_core.demo.model import TinyPipeline, build_pipeline, bundled_weights_path, load_weights
from nfq_core.errors import NFQError
from nfq_core.files.container import NFQFile
from nfq_core.files.safetensors_io import describe
from nfq_core.packed.formats import LEVELS, TRELLIS_IDS
from nfq_core.parallel import ordered_map
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULTS, PRESETS, BitsPerWeight, Formats, Settings
from nfq_core.report.metrics import psnr_db, ssim

from . import ggml
from .peers import OURS, Contestant, Stored, ggml_stored
from .weights import DEMO, Layer, figures, mix_rows, row
from .worlds import OUTPUT_BATCH, PEAK, SHAPES

PROMPTS, HELD_OUT = 32, 16  # Number of captions for the calibration, and of other captions to draw
# The measurement's part of the results.
FACTS = {"prompts": PROMPTS, "held_out": HELD_OUT, "output_batch": OUTPUT_BATCH}
# Packed bits per weight of the sizes: the presets', and some between peers'. A size that gives the same formats as the
# one before is left out.
TARGETS = (2.6, *PRESETS.values(), 3.13, 3.85, 5.3, 6.36, 8.0)

StoredWeights = Mapping[str, Stored]


class DemoModel:
    """The demo model's weights that the defaults quantise, stored in any format and compared with the original."""

    def __init__(self, calibration: Calibration) -> None:
        self.weights, self._calibration = load_weights(), calibration
        info, plans = plan_tensors(describe(self.weights), DEFAULTS)
        self.shapes = {key: plan.shape for key, plan in plans.items() if plan.format}
        self.inputs = calibration.for_plans(info, plans)[0]
        seen = SHAPES.captions(PROMPTS, CALIBRATION_SEED)
        self._batch = SHAPES.noisy_batch(OUTPUT_BATCH, HELD_OUT_SEED, without=seen)
        self._captions = SHAPES.captions(HELD_OUT, HELD_OUT_SEED, without=seen)
        self._output, self._pictures = self._run(build_pipeline(self.weights))

    @torch.no_grad()
    def _run(self, pipeline: TinyPipeline) -> tuple[torch.Tensor, torch.Tensor]:
        return pipeline(*self._batch), SHAPES.pictures(pipeline, self._captions, seed=0)

    def each(self, make: Callable[[str], Stored]) -> StoredWeights:
        """Store every weight as `make` does, given its name."""
        made = ordered_map(make, self.shapes, size=lambda key: 16 * self.weights[key].numel())
        return dict(zip(self.shapes, made, strict=True))

    def formats(self, bits: float) -> dict[str, str]:
        """The format ids of the weights at a size in packed bits per weight; NFQError if the size is too small."""
        plans = plan_tensors(describe(self.weights), Settings(BitsPerWeight(bits)))[1]
        return {key: plans[key].format.id for key in self.shapes}

    def calibrated(self, settings: Settings) -> StoredWeights:
        """Quantise the model with the calibration into a file, and read it."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "demo.nfq.safetensors"
            quantize_file(bundled_weights_path(), target, settings, calibration=self._calibration)
            with NFQFile(target) as file:
                return {
                    key: Stored(file.load(key).dequantize(), file.stored_bytes(key), file.packed_bytes(key))
                    for key in self.shapes
                }

    def layers(self, made: StoredWeights) -> dict[str, Layer]:
        """Size and error of each stored weight."""
        return {key: Layer.of(self.weights[key], part) for key, part in made.items()}

    def judge(self, made: StoredWeights) -> dict[str, float]:
        """The `figures` of stored weights; `output_db` (SQNR of the output), `picture_db` (PSNR) and `ssim` with them.

        Several threads may call this.
        """
        decoded = {key: part.weight for key, part in made.items()}
        output, pictures = self._run(build_pipeline(self.weights | decoded))
        return figures(self.layers(made).values()) | {
            "output_db": sqnr_db(self._output, output),
            "picture_db": psnr_db(self._pictures, pictures, PEAK),
            "ssim": ssim(self._pictures, pictures, PEAK),
        }


class Setting(NamedTuple):
    """The demo model's weights in one setting."""

    name: str
    family: str
    calibrated: bool
    made: StoredWeights
    judged: bool = True  # Whether output and pictures are compared too


def _settings(model: DemoModel, contestants: Sequence[Contestant], layers: dict[str, dict]) -> Iterator[Setting]:
    """Each contestant's format, each size, then the calibrated ones; fills `layers` by name of our formats.

    Users get trellis formats mixed only, so that one by itself gets no pictures.
    """
    ours: dict[str, StoredWeights] = {}
    for one in contestants:
        made = model.each(lambda key, one=one: one.store(model.weights[key]))
        if one.ours:
            ours[one.format], layers[one.name] = made, model.layers(made)
        yield Setting(one.name, one.family, False, made, one.format not in TRELLIS_IDS)
    before, calibrated = None, {f"nf{levels}": Settings(Formats.of(levels, levels)) for levels in LEVELS}
    for bits in sorted(TARGETS):
        try:
            formats = model.formats(bits)
        except NFQError:
            continue
        if formats != before:
            calibrated[f"size {bits}"] = Settings(BitsPerWeight(bits))
            yield Setting(f"size {bits}", OURS, False, {key: ours[id][key] for key, id in formats.items()})
        before = formats

    def with_importance(name: str, key: str) -> Stored:
        weight, inputs = model.weights[key], model.inputs.get(key)
        return ggml_stored(weight, name, inputs and inputs.importance.repeat_interleave(weight[0, 0].numel()))

    for name in (one.name for one in contestants if one.name in ggml.K_TYPES):
        yield Setting(f"{name} imatrix", "GGUF", True, model.each(partial(with_importance, name)))
    for name, settings in calibrated.items():
        yield Setting(f"{name}, calibrated", OURS, True, model.calibrated(settings))


def demo_rows(contestants: Sequence[Contestant], calibration: Calibration) -> list[dict]:
    """The figures of the demo model in every setting, and of the mixes of our formats."""
    model = DemoModel(calibration)
    layers: dict[str, dict[str, Layer]] = {}

    def measure(setting: Setting) -> dict:
        found = model.judge(setting.made) if setting.judged else figures(model.layers(setting.made).values())
        print(f"  {setting.name}", flush=True)
        return row(DEMO, setting.name, setting.family, calibrated=setting.calibrated, **found)

    def nbytes(setting: Setting) -> int:
        return sum(part.weight.nbytes for part in setting.made.values())

    rows = list(ordered_map(measure, _settings(model, contestants, layers), size=nbytes))
    return rows + mix_rows(DEMO, contestants, layers, model.shapes)
