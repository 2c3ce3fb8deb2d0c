"""Fifty answers over two, three and five processes: each is the unsplit one, token for token."""

import pytest
import trio

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import AivillageError

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)

pytest.importorskip("torch", reason="the extra `models` is not installed")

from tests.integration.split_processes import compared, questions, unsplit

pytestmark = pytest.mark.slow
PROMPTS = 50


@pytest.fixture(scope="module")
def wanted():
    said = unsplit(questions(PROMPTS))
    assert len({tuple(ids) for ids, *_ in said}) > PROMPTS // 2, "the questions are all alike"
    return said


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_fifty_answers_over_stage_processes_are_the_unsplit_ones(wanted, parts):
    found = trio.run(compared, parts, questions(PROMPTS), wanted)
    assert found.count == PROMPTS
    assert found.different == []
    assert found.is_one_class
    assert found.rounds < found.tokens, "no guess was right"
