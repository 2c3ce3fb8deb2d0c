"""Draws: greedy, inverse distribution, nucleus; keyed by seed and position alone."""

import hashlib
import math

import pytest
import torch

from aivillage.models.inference import sampling


def test_the_uniform_draw_is_the_keyed_hash():
    digest = hashlib.blake2b(bytes(7) + b"\x05" + bytes(7) + b"\x02", digest_size=8).digest()
    assert sampling.uniform(5, 2) == int.from_bytes(digest, "big") / 2**64
    assert sampling.uniform(5, 2) != sampling.uniform(2, 5)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert sampling.choose(logits, temperature=0, top_p=1, u=0.99) == 1


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.24, 0), (0.26, 1), (0.74, 1), (0.76, 3)])
def test_the_draw_inverts_the_distribution_in_id_order(u, token):
    logits = torch.tensor([0.25, 0.5, 0.0, 0.25]).log()
    assert sampling.choose(logits, temperature=1, top_p=1, u=u) == token


def test_a_draw_of_one_never_leaves_the_possible_tokens():
    logits = torch.tensor([1.0, 1.0, -math.inf])
    assert sampling.choose(logits, temperature=1, top_p=1, u=1.0) == 1


def test_temperature_sharpens():
    logits = torch.tensor([0.0, 1.0])
    assert sampling.choose(logits, temperature=1.0, top_p=1, u=0.2) == 0
    assert sampling.choose(logits, temperature=0.1, top_p=1, u=0.2) == 1


def test_the_nucleus_keeps_the_fewest_likeliest_tokens_of_its_mass():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    drawn = {sampling.choose(logits, temperature=1, top_p=0.6, u=n / 100) for n in range(100)}
    assert drawn == {1, 3}


def test_the_nucleus_prefers_low_ids_among_equals():
    logits = torch.zeros(4)
    drawn = {sampling.choose(logits, temperature=1, top_p=0.5, u=n / 100) for n in range(100)}
    assert drawn == {0, 1}
