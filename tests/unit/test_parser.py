"""The command line's grammar: what stands where, and what it means."""

import msgspec
import pytest

from aivillage.cli import jobs
from aivillage.cli.main import build_parser
from aivillage.models.inference.generate import GenerateRequest


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


def test_an_operations_own_fields_are_flags_and_nested_ones_take_json(capsys):
    operation = {
        "name": "inference.generate",
        "positional": "prompt",
        "request_schema": msgspec.json.schema(GenerateRequest),
    }
    words = ["why?", "--format", '{"choice": ["yes", "no"]}', "--logprobs", "3"]
    found = jobs._request(operation, words)
    assert found == {"prompt": "why?", "format": {"choice": ["yes", "no"]}, "logprobs": 3}
    with pytest.raises(SystemExit) as caught:
        jobs._request(operation, ["why?", "--format", "yes"])
    assert caught.value.code == 2
    assert "argument --format: that is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["jobs --json list", "jobs list --json", "owner --json show"])
def test_json_counts_before_and_after_an_actions_name(words):
    args = build_parser().parse_args(words.split())
    assert args.json
    assert args.data_dir is None
