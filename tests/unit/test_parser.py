"""The command line's grammar: what stands where, and what it means."""

import pytest

from aivillage.cli.main import build_parser


@pytest.mark.parametrize(
    "words",
    [
        "jobs --data-dir X list",
        "jobs list --data-dir X",
        "owner --data-dir X init",
        "balance --data-dir X",
    ],
)
def test_a_folder_counts_before_and_after_an_actions_name(words):
    """Else a key would be made in another node's folder."""
    assert build_parser().parse_args(words.split()).data_dir == "X"


@pytest.mark.parametrize("words", ["jobs --json list", "jobs list --json", "owner --json show"])
def test_json_counts_before_and_after_an_actions_name(words):
    args = build_parser().parse_args(words.split())
    assert args.json
    assert args.data_dir is None
