"""The NFQ tab, which describes and quantises checkpoints, and the settings."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import gradio as gr
from modules import script_callbacks
from modules.options import OptionHTML, OptionInfo, options_section

from ..nfq_core import NFQError, Settings
from ..nfq_core.checkpoints.examine import file_info, info_lines
from ..nfq_core.fitting.codebook import EFFORTS
from ..nfq_core.packed.formats import LEVELS
from ..nfq_core.planning.settings import (
    BY_LEVELS,
    DEFAULT_CONV_LEVELS,
    DEFAULT_LEVELS,
    DEFAULT_PRESET,
    DEFAULTS,
    FIVE_BITS_UP_TO,
    PRESETS,
    TEXT_ENCODERS,
)
from . import patching
from .conversion import DROP_EXTRAS, Converter, default_name, target_path
from .loading import KEEP_PACKED, is_ours

SECTION = ("nfq", "NFQ")

AUTO = "auto"
"""The choice with which the preset says how text encoders are stored."""

converter = Converter()


def register(sd_models: ModuleType, shared: ModuleType, forge: bool) -> None:
    """Add the tab and the settings to the program's page."""
    script_callbacks.on_ui_tabs(lambda: [(_tab(sd_models, shared), "NFQ", "nfq")])
    script_callbacks.on_ui_settings(lambda: _add_settings(sd_models, shared, forge))


def facts(path: str) -> str:
    """Describe a checkpoint as HTML: facts about one of ours, one sentence about any other."""
    try:
        if not is_ours(path):
            return "<p>Not quantised with NFQ.</p>"
        rows = info_lines(os.path.basename(path), file_info(path))
    except NFQError as error:
        return _refusal(error)
    lines = (f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(lines)}</table>"


def _presets_in_words() -> str:
    return ", ".join(f"{name} {bits}" for name, bits in PRESETS.items())


def _refusal(error: NFQError) -> str:
    return f"<p class='error'>{html.escape(str(error))}</p>"


def _add_settings(sd_models: ModuleType, shared: ModuleType, forge: bool) -> None:
    ours = [info for info in sd_models.checkpoints_list.values() if is_ours(info.filename)]
    listed = "".join(f"<h4>{html.escape(info.name)}</h4>{facts(info.filename)}" for info in ours)
    options = {
        "nfq_facts": OptionHTML(listed or "No checkpoint is quantised with NFQ yet. Use the NFQ tab to quantise one.")
    }
    if forge:
        label = "Keep weights packed in memory (applies when a checkpoint is loaded)"
        options[KEEP_PACKED] = OptionInfo(True, label)
    for name, option in options_section(SECTION, options).items():
        shared.opts.add_option(name, option)


def _tab(sd_models: ModuleType, shared: ModuleType) -> gr.Blocks:
    def titles() -> list[str]:
        return [info.title for info in sd_models.checkpoints_list.values()]

    def current() -> str | None:
        info = sd_models.checkpoint_aliases.get(shared.opts.sd_model_checkpoint)
        return info.title if info else None

    def path_of(title: str | None) -> str:
        info = sd_models.get_closet_checkpoint_match(title)
        if info is None:
            raise NFQError("no such checkpoint; choose one from the list")
        return info.filename

    def show(title: str | None) -> str:
        try:
            return facts(path_of(title))
        except NFQError as error:
            return _refusal(error)

    def refresh() -> tuple[Any, str]:
        sd_models.list_models()
        chosen = current()
        return gr.update(choices=titles(), value=chosen), show(chosen)

    def work(title: str, *form: Any) -> Iterator[str]:
        """Run a work on the form's inputs, or say in one line why it cannot run."""
        *dial, name, overwrite, drop_extras, run = form
        try:
            source = path_of(title)
            settings = _settings(*dial)
            target = target_path(_folder(sd_models, shared), name or default_name(source, settings))
            yield from run(source, target, settings, overwrite, drop_extras)
        except NFQError as error:
            yield f"Error: {error}"

    def quantise(*form: Any) -> Iterator[str]:
        yield from work(*form, converter.run)
        sd_models.list_models()

    def estimate(*form: Any) -> Iterator[str]:
        yield from work(
            *form, lambda source, target, settings, _, extras: converter.estimate(source, target, settings, extras)
        )

    def last_line(lines: Callable[..., Iterator[str]]) -> Callable[..., str]:
        return lambda *form: list(lines(*form))[-1]

    with gr.Blocks(analytics_enabled=False) as tab:
        for limit in patching.limits:
            gr.HTML(f"<p class='error'>{html.escape(limit)}</p>")
        with gr.Row():
            chosen = gr.Dropdown(titles(), value=current, label="Checkpoint", scale=4, elem_id="nfq_checkpoint")
            again = gr.Button("Refresh", scale=1, elem_id="nfq_refresh")
        about = gr.HTML(elem_id="nfq_facts")
        dial = _dial()
        with gr.Row():
            name = gr.Textbox(
                label="Name of the new checkpoint", placeholder="default: the source name with the preset or levels"
            )
            overwrite = gr.Checkbox(False, label="Overwrite")
            drop_extras = gr.Checkbox(
                False, label=DROP_EXTRAS, info="EMA weights, optimizer states and other tensors that no loader uses"
            )
        with gr.Row():
            before = gr.Button("Estimate size and time", elem_id="nfq_estimate")
            start = gr.Button("Quantise", variant="primary", elem_id="nfq_quantise")
            stop = gr.Button("Stop", elem_id="nfq_stop")
        status = gr.Textbox(label="Progress", lines=3, interactive=False, elem_id="nfq_status")

        chosen.change(show, [chosen], [about], queue=False)
        again.click(refresh, [], [chosen, about], queue=False)
        form = [chosen, *dial, name, overwrite, drop_extras]
        for button, lines in ((before, estimate), (start, quantise)):
            # Without the program's queue the page can show only the last line.
            button.click(last_line(lines) if shared.cmd_opts.no_gradio_queue else lines, form, [status])
        stop.click(converter.stop, [], [], queue=False)
    return tab


def _folder(sd_models: ModuleType, shared: ModuleType) -> str:
    """The folder for new checkpoints, which the program lists; Forge Neo can have several."""
    options = shared.cmd_opts
    return getattr(options, "ckpt_dir", None) or next(iter(getattr(options, "ckpt_dirs", [])), sd_models.model_path)


def _settings(preset: str, effort: str, text_encoders: str, levels: int, conv_levels: int) -> Settings:
    """Settings from the values of `_dial`'s inputs."""
    stored = None if text_encoders == AUTO else text_encoders
    return Settings.from_form(preset, int(levels), int(conv_levels), effort, text_encoders=stored)


def _dial() -> list[gr.components.Component]:
    """The inputs that say how a checkpoint is quantised, in the words of the nodes for ComfyUI."""
    only = f"Counts only with preset {BY_LEVELS}."
    small = ", ".join(name for name, bits in PRESETS.items() if bits <= FIVE_BITS_UP_TO)
    with gr.Row():
        preset = gr.Dropdown(
            [*PRESETS, BY_LEVELS],
            value=DEFAULT_PRESET,
            label="Preset",
            info=f"The size: {_presets_in_words()} bits per weight. Each layer gets the format that its sensitivity "
            f"asks for. With {BY_LEVELS}, every layer gets the number of levels chosen here.",
        )
        effort = gr.Dropdown(
            list(EFFORTS),
            value=DEFAULTS.effort,
            label="Effort",
            info="fast chooses among scalar codebooks. best chooses among trellis codes, which are closer to the "
            "original at the same size, but take minutes.",
        )
        text_encoders = gr.Dropdown(
            [AUTO, *TEXT_ENCODERS],
            value=AUTO,
            label="Text encoders",
            info=f"How text encoders are stored. {AUTO}: 5 bits with presets {small}, else 8 bits. keep: unchanged.",
        )
        levels = gr.Dropdown(list(LEVELS), value=DEFAULT_LEVELS, label="Levels", info=f"{only} For Linear layers.")
        conv_levels = gr.Dropdown(list(LEVELS), value=DEFAULT_CONV_LEVELS, label="Levels of convolutions", info=only)
    return [preset, effort, text_encoders, levels, conv_levels]
