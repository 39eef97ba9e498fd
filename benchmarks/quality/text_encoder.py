"""Hidden states of text encoders with packed weights: `python -m benchmarks.quality.text_encoder [--model DIR]`.

Measures the demo model's word encoder, and the model in DIR (transformers' layout, with its tokeniser) if given: the
signal-to-noise ratio of the last hidden states, and the mean cosine of tokens, against the same model with its own
weights, in fp32. Token embeddings and layers are quantised apart and together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from nfq_core import quantize
from nfq_core.calibration.prompts import PROMPTS
from nfq_core.decibels import sqnr_db
from nfq_core.demo.model import WordEncoder, load_weights, split_weights
from nfq_core.demo.shapes import VOCABULARY, tokenise
from nfq_core.planning.policy import EMBEDDING_FORMAT

from ..shared import argument_parser, dated_table, write_results

FORMATS = ("nf16_b64", "t4w8_b64", "nf32_b64", "t5w9_b64", "nf256_b64")

CAPTIONS = 64

Outputs = Callable[[], torch.Tensor]
"""Computes the hidden states of a model, fp32 of shape (tokens, width)."""


def measure(model: nn.Module, outputs: Outputs, tokens: str) -> dict:
    """Ratio in dB and cosine for each format.

    Args:
        model: weights are replaced, and restored.
        outputs: see Outputs.
        tokens: name of the table of token embeddings.
    """
    layers = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() >= 1024
    ]
    wanted = outputs()
    found = {}
    for format_id in FORMATS if layers else ():
        found[format_id] = _with({name: format_id for name in layers}, model, outputs, wanted)
        both = {name: format_id for name in layers} | {tokens: EMBEDDING_FORMAT}
        found[f"{format_id}, embeddings {EMBEDDING_FORMAT}"] = _with(both, model, outputs, wanted)
    found[f"embeddings {EMBEDDING_FORMAT}"] = _with({tokens: EMBEDDING_FORMAT}, model, outputs, wanted)
    return found


def _with(formats: Mapping[str, str], model: nn.Module, outputs: Outputs, wanted: torch.Tensor) -> dict:
    before = {name: model.get_parameter(name).data for name in formats}
    for name, format_id in formats.items():
        model.get_parameter(name).data = quantize(before[name], format=format_id).dequantize(torch.float32)
    actual = outputs()
    for name, weight in before.items():
        model.get_parameter(name).data = weight
    cosine = nn.functional.cosine_similarity(wanted, actual, dim=-1).mean()
    return {"sqnr_db": round(sqnr_db(wanted, actual), 2), "cosine": round(float(cosine), 5)}


def demo() -> dict:
    """The demo model's encoder: embeddings, positions and a normalisation."""
    encoder = WordEncoder()
    encoder.load_state_dict({name: tensor.float() for name, tensor in split_weights(load_weights())[1].items()})
    words = list(VOCABULARY)
    ids = torch.from_numpy(tokenise([word for word in words if word.strip()][:CAPTIONS]))
    return measure(encoder, lambda: encoder(ids)[0].flatten(0, 1), "words.weight")


def transformer(folder: Path) -> dict:
    """A model of transformers' layout."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(folder)(list(PROMPTS), return_tensors="pt", padding=True)
    real = batch["attention_mask"].bool()
    table = model.get_input_embeddings()
    tokens = next(f"{name}.weight" for name, module in model.named_modules() if module is table)
    return measure(model, lambda: model(**batch).last_hidden_state[real], tokens)


@torch.no_grad()
def run(folder: Path | None) -> dict:
    """All measurements, as written to the results."""
    results = {"demo": demo()}
    if folder is not None:
        results[folder.name] = transformer(folder)
    return results


def table(results: dict) -> str:
    """Ratio and cosine of each format, by model."""
    models = [name for name in results if name not in ("command", "machine")]
    settings = dict.fromkeys(setting for name in models for setting in results[name])
    rows = []
    for setting in settings:
        cells = [
            f"{results[name][setting]['sqnr_db']:.1f} dB, {results[name][setting]['cosine']:.4f}"
            if setting in results[name]
            else "–"
            for name in models
        ]
        rows.append([setting, *cells])
    return dated_table(["hidden states: SQNR, cosine", *models], rows, results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="a text encoder in transformers' layout")
    found = run(parser.parse_args().model)
    for model, rows in found.items():
        for setting, row in rows.items():
            print(f"{model:24} {setting:36} {row['sqnr_db']:6.2f} dB  cosine {row['cosine']:.5f}")
    print(write_results("text_encoder", found))
