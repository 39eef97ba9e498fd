"""The NFQ tab, which describes and quantises checkpoints, and the settings."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
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
from .conversion import DROP_EXTRAS, Converter, default_name, target_path
from .loading import KEEP_PACKED, is_ours

SECTION = ("nfq", "NFQ")

DEFAULT = "default"
"""The choice for text encoders that leaves it to the size, see `Settings.text_encoder_bits`."""

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
    return f"bits per weight: {', '.join(f'{name} {bits}' for name, bits in PRESETS.items())}"


def _text_encoders_in_words() -> str:
    small = ", ".join(name for name, bits in PRESETS.items() if bits <= FIVE_BITS_UP_TO)
    return f"Text encoders (default: 5bit with preset {small}, else 8bit)"


def _refusal(error: NFQError) -> str:
    return f"<p class='error'>{html.escape(str(error))}</p>"


def _add_settings(sd_models: ModuleType, shared: ModuleType, forge: bool) -> None:
    ours = [info for info in sd_models.checkpoints_list.values() if is_ours(info.filename)]
    listed = "".join(f"<h4>{html.escape(info.name)}</h4>{facts(info.filename)}" for info in ours)
    options = {
        "nfq_facts": OptionHTML(listed or "No checkpoint is quantised with NFQ yet. Use the NFQ tab to quantise one.")
    }
    if forge:
        label = "Keep weights of Linear layers packed in memory (applies when a checkpoint is loaded)"
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

    def lines(
        title: str,
        preset: str,
        effort: str,
        levels: int,
        conv_levels: int,
        text_encoders: str,
        name: str,
        overwrite: bool,
        drop_extras: bool,
    ) -> Iterator[str]:
        try:
            source = path_of(title)
            folder = shared.cmd_opts.ckpt_dir or sd_models.model_path
            bits = None if text_encoders == DEFAULT else text_encoders
            settings = Settings.from_form(preset, int(levels), int(conv_levels), effort, text_encoders=bits)
            target = target_path(folder, name or default_name(source, settings))
            yield from converter.run(source, target, settings, overwrite, drop_extras)
            sd_models.list_models()
        except NFQError as error:
            yield f"Error: {error}"

    def last_line(*inputs: Any) -> str:
        return list(lines(*inputs))[-1]

    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row():
            chosen = gr.Dropdown(titles(), value=current, label="Checkpoint", elem_id="nfq_checkpoint")
            again = gr.Button("Refresh", elem_id="nfq_refresh")
        about = gr.HTML(elem_id="nfq_facts")
        with gr.Row():
            preset = gr.Dropdown([*PRESETS, BY_LEVELS], value=DEFAULT_PRESET, label=f"Preset ({_presets_in_words()})")
            effort = gr.Dropdown(list(EFFORTS), value=DEFAULTS.effort, label="Effort (best takes minutes)")
            only = f"(only with preset {BY_LEVELS})"
            levels = gr.Dropdown(list(LEVELS), value=DEFAULT_LEVELS, label=f"Levels of Linear layers {only}")
            conv_levels = gr.Dropdown(list(LEVELS), value=DEFAULT_CONV_LEVELS, label=f"Levels of convolutions {only}")
            text_encoders = gr.Dropdown([DEFAULT, *TEXT_ENCODERS], value=DEFAULT, label=_text_encoders_in_words())
        with gr.Row():
            name = gr.Textbox(
                label="Name of the new checkpoint", placeholder="default: the source name with the preset or levels"
            )
            overwrite = gr.Checkbox(False, label="Overwrite")
            drop_extras = gr.Checkbox(
                False, label=DROP_EXTRAS, info="EMA weights, optimizer states and other tensors that no loader uses"
            )
        with gr.Row():
            start = gr.Button("Quantise", variant="primary", elem_id="nfq_quantise")
            stop = gr.Button("Stop", elem_id="nfq_stop")
        status = gr.Textbox(label="Progress", lines=3, interactive=False, elem_id="nfq_status")

        chosen.change(show, [chosen], [about], queue=False)
        again.click(refresh, [], [chosen, about], queue=False)
        # Without the program's queue the page can show only the last line.
        handler = last_line if shared.cmd_opts.no_gradio_queue else lines
        inputs = [chosen, preset, effort, levels, conv_levels, text_encoders, name, overwrite, drop_extras]
        start.click(handler, inputs, [status])
        stop.click(converter.stop, [], [], queue=False)
    return tab
