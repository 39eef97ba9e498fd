"""The documents: links, file names, commands and examples in them are right; what is published is complete."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
import stub_host
from safetensors.torch import save_file
from samples import random_unet

from nfq_core.cli.commands import _parser

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"build", "dist", "shared", "venv"}


def is_document(path: Path) -> bool:
    """Whether a Markdown file belongs to the repository: nothing built, and nothing hidden but `.github`."""
    folders = path.relative_to(ROOT).parts[:-1]
    return all(name == ".github" or (name not in NOT_OURS and name[0] != ".") for name in folders)


DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if is_document(path))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def code_blocks(path: Path, language: str) -> list[str]:
    """The blocks of code of one language; "" for those without."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def words(path: Path) -> int:
    """Number of words outside code, tables, pictures and the targets of links."""
    lines = (line for line in prose(path).splitlines() if not line.startswith("|"))
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", "\n".join(lines))
    return len(re.findall(r"\S*\w\S*", re.sub(r"\]\([^)]*\)", "]", text)))


def links(path: Path) -> list[str]:
    """Targets of Markdown links and pictures, and of HTML ones."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    return re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def test_anchors_are_githubs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# In `x`, and *y*\n```\n# code\n```\n## SDXL's UNet at [full](a.md) size\n## Sizes\n## Sizes\n")
    assert anchors(page) == {"in-x-and-y", "sdxls-unet-at-full-size", "sizes", "sizes-1"}


def test_the_documents_are_found() -> None:
    assert {"README.md", "docs/README.md", "CONTRIBUTING.md", "web/docs/NFInspect.md"} <= set(map(by_name, DOCUMENTS))
    assert "docs/images/comparison.png" in links(ROOT / "README.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{by_name(path)} links to {link}, which does not exist"
        assert ROOT in target.parents, f"{by_name(path)} links to {link}, which is outside of the repository"
        if anchor:
            assert anchor in anchors(target), f"{by_name(path)} links to {link}; there is no such heading"


def test_words_are_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Two words\n```\ncode\n```\n| no | table |\n![no picture](a.png) – `one`, [a link](b.md#c)\n")
    assert words(page) == 5


def test_the_front_page_is_short() -> None:
    page = ROOT / "README.md"
    assert words(page) <= 1000
    text = prose(page)
    assert len(re.findall(r"^\|[-|: ]+\|$", text, re.MULTILINE)) <= 3, "tables"
    assert len(re.findall(r"!\[|<img", text)) <= 3, "pictures"


def figures(page: str) -> set[tuple[str, str]]:
    """Numbers with a unit behind them, also those of sums and ranges; a table's figures without one are not found."""
    several = r"(\d[\d.]*(?:(?: GB| s)? [+–] \d[\d.]*)*) (GB|s|minutes|dB|×|million)(?!\w)"
    found = re.findall(several, (ROOT / page).read_text("utf-8"))
    return {(number, unit) for numbers, unit in found for number in re.findall(r"\d+(?:\.\d+)?", numbers)}


def test_figures_of_the_front_page_are_among_the_benchmarks() -> None:
    quoted = figures("README.md") - {(card, "GB") for card in ("4", "6", "8", "12")}
    assert {(size, "GB") for size in ("6.94", "1.27", "5.14", "1.64")} <= quoted
    assert {("30", "s"), ("1.14", "×"), ("8.2", "million"), ("79", "minutes")} <= quoted
    measured = figures("docs/BENCHMARKS.md")

    def is_measured(number: str, unit: str) -> bool:
        if unit != "s":
            return (number, unit) in measured
        decimals = len(number.partition(".")[2])
        return any(round(float(other), decimals) == float(number) for other, same in measured if same == unit)

    assert not {figure for figure in quoted if not is_measured(*figure)}


def test_every_page_is_in_the_index() -> None:
    index = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert {page for page in PAGES if page != ROOT / "docs" / "README.md"} <= index


def test_tables_are_marked_once_and_whole() -> None:
    """`python -m benchmarks.tables` fills what is between `<!-- NAME -->` and `<!-- /NAME -->`."""
    counts = Counter(name for page in PAGES for name in re.findall(r"<!-- (/?\w+) -->", page.read_text("utf-8")))
    assert counts and set(counts.values()) == {1}
    names = {name for name in counts if name[0] != "/"}
    assert {f"/{name}" for name in names} == counts.keys() - names


ENTRIES = {"no package": ROOT / "nfq_core"}
ENTRIES |= {f"`{path.name}/`": path for path in (ROOT / "nodes", ROOT / "nfq_webui")}
ENTRIES |= {f"`{path.parent.name}/`": path.parent for path in sorted((ROOT / "nfq_core").glob("*/__init__.py"))}
"""Entries of the architecture's lists, and the folders whose modules they name."""


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_architecture_names_every_module(entry: str) -> None:
    """Each in the entry of its folder, and none that is not there."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    (files,) = re.findall(rf"^- {entry}: (.*?)\n(?=\n|- )", text, re.DOTALL | re.MULTILINE)
    modules = {path.name for path in ENTRIES[entry].glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"`(\w+\.py)`", files)) == modules


def test_the_architecture_names_every_script_of_the_page() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    scripts = {path.relative_to(ROOT / "web").as_posix() for path in (ROOT / "web").rglob("*.js")}
    assert set(re.findall(r"`([\w/]+\.js)`", text)) - {f"web/{name}" for name in scripts} == scripts


def files_named(path: Path) -> set[str]:
    """Names of files in a document that begin with a folder of the repository, of `nfq_core` or of `web`."""
    found = re.findall(r"(?<![\w./~-])((?:[\w.]+/)+[\w.]+\.(?:py|js|md|json|yml|toml))\b", path.read_text("utf-8"))
    return {name for name in found if any((base / name.partition("/")[0]).is_dir() for base in BASES)}


BASES = (ROOT, ROOT / "nfq_core", ROOT / "web")
NOT_THERE = {"benchmarks/results/NAME.json", "tests/host/last_run.json"}
"""A placeholder, and what a full run of the host tests writes."""


def test_names_of_files_are_found() -> None:
    named = files_named(ROOT / "docs" / "ARCHITECTURE.md")
    assert {"packed/formats.py", "tests/test_layering.py", "lib/chart.js", "locales/en/main.json"} <= named


@pytest.mark.parametrize("path", TEXTS, ids=by_name)
def test_files_that_pages_name_exist(path: Path) -> None:
    named = files_named(path) - NOT_THERE
    assert not {name for name in named if not any((base / name).exists() for base in BASES)}


@pytest.mark.parametrize("path", TEXTS, ids=by_name)
def test_benchmarks_that_pages_name_exist(path: Path) -> None:
    for module in set(re.findall(r"python -m\s+(benchmarks(?:\.\w+)+)", path.read_text("utf-8"))):
        where = ROOT.joinpath(*module.split("."))
        assert where.with_suffix(".py").exists() or (where / "__main__.py").exists(), module


def commands() -> list[str]:
    """Every whole `nfq` command in the pages' blocks of code, also those that name the plugin's folder."""
    blocks = [block for page in PAGES for block in code_blocks(page, "")]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [re.sub(r"^\S*python\S* \S*custom_nodes\S*ComfyUI-NFQ ", "nfq ", line) for line in lines]
    return sorted({line.rpartition("&& ")[2] for line in lines if re.search(r"(^|&& )nfq ", line)})


def test_commands_are_found() -> None:
    found = commands()
    assert "nfq demo" in found and "nfq quantize models/checkpoints/model.safetensors" in found


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_are_understood(command: str) -> None:
    options = _parser().parse_args(shlex.split(command)[1:])
    assert callable(options.run)


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "CLI.md").read_text("utf-8")
    (choices,) = (action.choices for action in _parser()._actions if action.choices)
    for name, parser in choices.items():
        assert f"| `nfq {name}" in text, name
        for option in {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}:
            assert f"`{option}" in text or f" {option}" in text, f"nfq {name} {option}"


def test_the_example_of_the_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(random_unet(), tmp_path / "model.safetensors")
    names: dict = {}
    for block in code_blocks(ROOT / "docs" / "PYTHON.md", "python"):
        exec(compile(block, "docs/PYTHON.md", "exec"), names)
    assert (names["weight"].dequantize() == names["buffer"]).all()
    assert (tmp_path / "model-small.nfq.safetensors").exists() and (tmp_path / "model-fp16.safetensors").exists()


def test_every_example_in_python_is_run() -> None:
    """Here, or by `test_diffusers_pipeline.py`."""
    pages = {by_name(page) for page in DOCUMENTS if code_blocks(page, "python")}
    run_with_diffusers = {"README.md", "docs/DIFFUSERS.md", "docs/CALIBRATION.md", "docs/BENCHMARKS.md"}
    assert pages == {"docs/PYTHON.md"} | run_with_diffusers


def test_workflows_and_forms_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    if not files[:-1]:
        pytest.skip("this copy has no .github")
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict), file


def test_what_the_registry_gets_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without what `.comfyignore` names, which follows the rules of `.gitignore`, so that git can apply it."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this copy is no git repository")

    def listed(*options: str) -> set[str]:
        run = subprocess.run([git, "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"git: {run.stderr}")
        return set(run.stdout.split("\0")) - {""}

    everything = {name for name in listed() if (ROOT / name).is_file()}
    ignored = listed("--cached", "--ignored", "--exclude-from=.comfyignore")
    assert "nfq_core/demo/weights/demo.safetensors" in ignored
    kept = everything - ignored
    needed = ("nodes/", "nfq_core/", "web/", "locales/", "example_workflows/")
    assert {name for name in everything if name.startswith(needed)} - kept == {"nfq_core/demo/weights/demo.safetensors"}
    assert {"__init__.py", "__main__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= kept
    assert sum((ROOT / name).stat().st_size for name in kept) < 2_000_000

    copy = tmp_path / "copy"
    for name in kept:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    for folder in ("diffusion_models", "checkpoints"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    stub_host.install(monkeypatch, tmp_path / "models")
    monkeypatch.setattr(stub_host, "ROOT", copy)
    plugin = stub_host.import_plugin(tmp_path / "ComfyUI-NFQ")
    assert callable(plugin.comfy_entrypoint)
