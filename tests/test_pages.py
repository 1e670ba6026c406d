"""README.md and docs/: links lead somewhere, and the commands are ones that the programs would take."""

import ast
import pathlib
import re
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from mim_jax.config import flatten, load
from mim_jax.convert.__main__ import parser

REPO = pathlib.Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), REPO / "results/README.md", REPO / "launch/README.md"]
name_of = lambda page: str(page.relative_to(REPO))


def anchors(page) -> set[str]:
    """The headings of a page as GitHub names them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page) -> list[list[str]]:
    """The words of every `python ...` in the text and in blocks of bash, comments left out, $RUN filled in."""
    text = page.read_text()
    found = [shlex.split(words) for words in re.findall(r"`python (-m \w[^`]+)`", text)]
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        variables = dict(re.findall(r"^(\w+)=(\S+)", block, re.M))
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$(\w+)", lambda found, known=variables: known[found[1]], line)
            if words := shlex.split(line, comments=True):
                found += [words[1:]] if words[0] == "python" else []
    return found


COMMANDS = [(name_of(page), words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{name_of(page)}: {link}"
            assert not anchor or anchor in anchors(there), f"{name_of(page)}: {link} names no heading"


def test_every_page_of_docs_is_reached_from_the_first():
    reached, waiting = set(), [REPO / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        found = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())}
        found |= {folder / "README.md" for folder in found if folder.is_dir()}
        waiting += [other for other in found if other in PAGES and other not in reached]
    assert set(PAGES) <= reached


def test_the_first_page_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("page, words", COMMANDS, ids=[" ".join([page, *words[1:3]]) for page, words in COMMANDS])
def test_commands_are_taken(page, words, monkeypatch):
    monkeypatch.chdir(REPO)
    module, arguments = words[1], [word for word in words[2:] if word != "..."]
    file = REPO / (module.replace(".", "/") + ".py")
    if module == "mim_jax.convert":
        parser().parse_args(arguments)
    elif module == "mim_jax.main":
        monkeypatch.setattr("sys.argv", [module, *arguments])  # where the config's flag looks for --config.key=...
        known = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=known)
        flags.DEFINE_string("workdir", "", "", flag_values=known)
        assert known([module, *arguments]) == [module] and known.config.job
    else:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call) and node.args]
        named = [c for c in calls if ast.unparse(c.func).startswith(("flags.DEFINE_", "parser.add_argument"))]
        defined = {c.args[0].value.lstrip("-") for c in named}
        files = 2 if "--compare" in arguments else 0  # which stand at its end without a flag
        assert {word.lstrip("-").partition("=")[0] for word in arguments[: len(arguments) - files]} <= defined


def test_commands_are_found():
    modules = {words[1] for _, words in COMMANDS}
    assert modules >= {"mim_jax.main", "mim_jax.convert", "mim_jax.visualise", "mim_jax.attention", "mim_jax.benchmark"}
    assert all(words[0] == "-m" for _, words in COMMANDS) and len(COMMANDS) > 25


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_named_in_the_text_are_there(page):
    known = {key for path in (REPO / "configs").glob("*.py") for key in flatten(load(str(path)))}
    text = re.sub(r"```.*?```|^    .*?$", "", page.read_text(), flags=re.S | re.M)  # of bash blocks tested above
    for key in re.findall(r"--config\.([a-z_.]+)=", text):
        assert key in known, f"{name_of(page)}: --config.{key}"
