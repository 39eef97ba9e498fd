"""The page's texts: complete in every language, all used by the scripts; a help page for each node."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from nfq_core.sizes import size_in_words

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "web").rglob("*.js")))
TRANSLATED = ("ja", "zh")


def words(language: str) -> dict[str, str]:
    return json.loads((ROOT / "locales" / language / "main.json").read_text("utf-8"))["nfq"]


def places(sentence: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", sentence))


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_language_has_every_text(language: str) -> None:
    english, other = words("en"), words(language)
    assert other.keys() == english.keys()
    for key, sentence in english.items():
        assert places(other[key]) == places(sentence), key
        assert other[key] and other[key] != sentence, key


@pytest.mark.parametrize("language", TRANSLATED)
def test_texts_use_the_nodes_display_names(language: str) -> None:
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    names = {node["display_name"] for node in nodes.values()}
    quoted = set(re.findall("「(.+?)」", " ".join(words(language).values())))
    assert len(quoted) == 4 and quoted <= names
    assert set(re.findall("「(.+?)」", json.dumps(nodes, ensure_ascii=False))) <= names


def test_scripts_and_texts_match() -> None:
    used = set(re.findall(r'\btext\("([\w.]+)"', SCRIPTS))
    groups = set(re.findall(r"\btext\(`([\w]+)\.\$\{", SCRIPTS))
    # Keys of texts about the end of a run are passed through a variable.
    used |= set(re.findall(r'\["execution_\w+", "(\w+)"\]', SCRIPTS))
    english = words("en")
    assert used <= english.keys()
    assert {key for key in english if key.partition(".")[0] not in groups} == used
    assert groups == {"goodFor", "order", "preset"}


def schemas(plugin: ModuleType) -> dict:
    extension = asyncio.run(plugin.comfy_entrypoint())
    return {schema.node_id: schema for schema in (n.define_schema() for n in asyncio.run(extension.get_node_list()))}


@pytest.mark.parametrize("language", TRANSLATED)
def test_nodes_are_translated_completely(plugin: ModuleType, language: str) -> None:
    translated = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    nodes = schemas(plugin)
    assert translated.keys() == nodes.keys()
    for name, schema in nodes.items():
        assert translated[name]["display_name"] and translated[name]["description"]
        inputs = translated[name]["inputs"]
        assert list(inputs) == [item.id for item in schema.inputs], name
        assert all(entry["name"] and entry["tooltip"] for entry in inputs.values())
        assert len(translated[name].get("outputs", {})) == len(schema.outputs)


def test_each_node_has_a_help_page_that_names_its_inputs(plugin: ModuleType) -> None:
    nodes = schemas(plugin)
    pages = {path.stem: path.read_text("utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
    assert pages.keys() == nodes.keys()
    for name, schema in nodes.items():
        assert pages[name].startswith(f"# {schema.display_name}\n")
        spelled = pages[name].replace("`image_2` … `image_8`", " ".join(f"`image_{n}`" for n in range(2, 9)))
        for item in schema.inputs:
            assert f"`{item.id}`" in spelled, (name, item.id)


def test_users_see_no_node_ids(plugin: ModuleType) -> None:
    """Texts, tooltips and help pages use the names on screen."""
    nodes = schemas(plugin)
    texts = [text for language in ("en", *TRANSLATED) for text in words(language).values()]
    texts += [path.read_text("utf-8") for path in (ROOT / "web" / "docs").glob("*.md")]
    for schema in nodes.values():
        texts += [schema.description, *(item.options["tooltip"] for item in schema.inputs)]
    for text in texts:
        assert not re.search("|".join(nodes), text)


def test_levels_have_advice() -> None:
    from nfq_core.packed.formats import TRELLIS_IDS, WRITABLE_IDS, format_by_id
    from nfq_core.planning.settings import PRESETS

    english = words("en")
    scalar = [format_by_id(id).levels for id in WRITABLE_IDS if id not in TRELLIS_IDS]
    assert {f"goodFor.{levels}" for levels in scalar} <= english.keys()
    assert {f"goodFor.t{format_by_id(id).code_bits}" for id in TRELLIS_IDS} <= english.keys()
    for name, bits in PRESETS.items():
        assert f" {bits} bits per weight" in english[f"preset.{name}"]


def test_scripts_write_no_markup() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", SCRIPTS)


def test_sizes_are_those_of_the_command(tmp_path: Path) -> None:
    sizes = [0, 1, 999, 1000, 95_000, 123_456, 1_234_567, 12_345_678, 123_456_789, 1_234_567_890]
    assert evaluate(tmp_path, "size", f"{sizes}.map(size)") == [size_in_words(each) for each in sizes]


def evaluate(tmp_path: Path, functions: str, expression: str) -> object:
    """What an expression with functions of `text.js` gives in Node.js, in English without texts."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    library, scripts = tmp_path / "extensions" / "nfq" / "lib", tmp_path / "scripts"
    library.mkdir(parents=True)
    scripts.mkdir()
    shutil.copy(ROOT / "web" / "lib" / "text.js", library)
    (tmp_path / "package.json").write_text('{"type": "module"}', "utf-8")
    settings = "{ ui: { settings: { getSettingValue: () => null } } }"
    for name, value in (("app", settings), ("api", "{}")):
        (scripts / f"{name}.js").write_text(f"export const {name} = {value};\n", "utf-8")
    code = f'import {{ {functions} }} from "{(library / "text.js").as_uri()}";\n'
    code += f"console.log(JSON.stringify({expression}))"
    done = subprocess.run([node, "--input-type=module", "-e", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_share_of_an_empty_whole_is_one(tmp_path: Path) -> None:
    """The page may divide by zero: a model of empty tensors has no bytes."""
    found = evaluate(tmp_path, "share, percent", "[share(0, 0), share(1, 4), percent(0, 0), percent(1, 4)]")
    assert found == [1, 0.25, "100 %", "25 %"]


def test_equal_weights_and_unknown_errors_differ(tmp_path: Path) -> None:
    found = evaluate(tmp_path, "decibels", "[decibels(21.456), decibels(null), decibels(undefined)]")
    assert found == ["21.46 dB", "equal", "–"]
