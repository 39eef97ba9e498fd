"""What every contestant makes of the demo model: its weights, its output, its pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nfq_core.calibration.statistics import Calibration
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.demo.model import bundled_weights_path, load_weights
from nfq_core.errors import NFQError
from nfq_core.files.container import NFQFile
from nfq_core.files.safefile import describe
from nfq_core.models.unet import detect
from nfq_core.packed.formats import LEVELS, TRELLIS_IDS
from nfq_core.parallel import ordered_map
from nfq_core.planning.policy import DEFAULTS, Settings, plan_tensors

from . import ggml
from .judge import Judge, Weights
from .peers import OURS, Contestant, Stored, ggml_stored
from .weights import DEMO, Layer, Layers, figures, mix_rows, row

TARGETS = (2.6, 3.0, 3.15, 3.7, 4.15, 4.7, 5.1, 5.5, 6.5, 8.0)
"""Packed bits per weight that a model is made for; of sizes that come to the same, the first."""

SHOWN = ("packed_bits_per_weight", "sqnr_db", "output_db", "picture_db")
"""Figures that are printed while the models are judged."""

StoredWeights = dict[str, Stored]


@dataclass(frozen=True)
class Model:
    """The demo model in one setting: what became of each weight that is quantised."""

    name: str
    family: str
    calibrated: bool
    made: StoredWeights
    judged: bool = True
    """Whether output and pictures are judged too."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as decoded."""
        return sum(part.weight.nbytes for part in self.made.values())


class DemoModels:
    """Makes the demo model in every setting, one after the other."""

    def __init__(self, contestants: Sequence[Contestant], calibration: Calibration, effort: str) -> None:
        self.weights = load_weights()
        self._contestants = contestants
        self._calibration = calibration
        self._effort = effort
        self._plans = {
            key: plan for key, plan in plan_tensors(describe(self.weights), DEFAULTS)[1].items() if plan.format
        }
        self.shapes = {key: plan.shape for key, plan in self._plans.items()}
        self.layers: dict[str, Layers] = {}
        """What became of each weight in each of our formats, by contestant; filled while models are made."""

    def models(self) -> Iterator[Model]:
        """The model in each contestant's format, at each target size, and calibrated.

        Of trellis formats by themselves the weights alone are judged: a user gets them mixed.
        """
        ours = {}
        for one in self._contestants:
            made = self._each(lambda key, one=one: one.store(self.weights[key]))
            if one.ours:
                ours[one.format] = made
                self.layers[one.name] = self.measured(made)
            yield Model(one.name, one.family, False, made, one.format not in TRELLIS_IDS)
        sizes, before = [], None
        for bits in TARGETS:
            plans = self._planned(bits)
            if plans is not None and plans != before:
                sizes.append(bits)
                yield Model(f"size {bits}", OURS, False, {key: ours[id][key] for key, id in plans.items()})
            before = plans
        yield from self._calibrated_peers()
        settings = {f"nf{levels}": Settings(levels, levels, self._effort) for levels in LEVELS}
        settings |= {f"size {bits}": Settings(effort=self._effort, target_bpw=bits) for bits in sizes}
        for name, chosen in settings.items():
            yield Model(f"{name}, calibrated", OURS, True, self._through_a_file(chosen))

    def measured(self, made: StoredWeights) -> dict[str, Layer]:
        """Sizes and errors of a model's weights."""
        return {key: Layer.of(self.weights[key], part) for key, part in made.items()}

    def _each(self, make: Callable[[str], Stored]) -> StoredWeights:
        made = ordered_map(make, self._plans, size=lambda key: 16 * self.weights[key].numel())
        return dict(zip(self._plans, made, strict=True))

    def _planned(self, bits: float) -> dict[str, str] | None:
        """The format of each weight that a user gets who asks for this size; None where there is none so small."""
        try:
            plans = plan_tensors(describe(self.weights), Settings(effort=self._effort, target_bpw=bits))[1]
        except NFQError:
            return None
        return {key: plans[key].format.id for key in self._plans}

    def _calibrated_peers(self) -> Iterator[Model]:
        """The K-quants with an importance matrix from the same calibration."""
        shapes = {key: tuple(tensor.shape) for key, tensor in self.weights.items()}
        inputs = self._calibration.for_plans(detect(shapes), self._plans)[0]

        def make(name: str, key: str) -> Stored:
            weight = self.weights[key]
            importance = inputs[key].importance.repeat_interleave(weight[0, 0].numel()) if key in inputs else None
            return ggml_stored(weight, name, importance)

        taking_part = {one.name for one in self._contestants}
        for name in ggml.K_TYPES:
            if name in taking_part:
                yield Model(f"{name} imatrix", "GGUF", True, self._each(partial(make, name)))

    def _through_a_file(self, settings: Settings) -> StoredWeights:
        """The model as quantised with the calibration, written and read."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "demo.nfq.safetensors"
            quantize_file(bundled_weights_path(), target, settings, calibration=self._calibration)
            with NFQFile(target) as file:
                return {
                    key: Stored(file.load(key).dequantize(), file.stored_bytes(key), file.packed_bytes(key))
                    for key in self._plans
                }


def demo_rows(contestants: Sequence[Contestant], calibration: Calibration, effort: str) -> list[dict]:
    """The figures of the demo model in every setting, our formats by themselves and mixed."""
    models = DemoModels(contestants, calibration, effort)
    judge = Judge(models.weights)

    def measure(model: Model) -> dict:
        values: Mapping[str, float] = figures(models.measured(model.made).values())
        if model.judged:
            decoded: Weights = {key: part.weight for key, part in model.made.items()}
            values = values | judge.judge(models.weights | decoded)
        return row(DEMO, model.name, model.family, calibrated=model.calibrated, **values)

    rows = []
    for measured in ordered_map(measure, models.models(), size=lambda model: model.nbytes):
        rows.append(measured)
        shown = (f"{name} {measured[name]:.2f}" for name in SHOWN if measured.get(name) is not None)
        print(f"  {measured['name']}: {', '.join(shown)}", flush=True)
    return rows + mix_rows(DEMO, contestants, models.layers, models.shapes)
