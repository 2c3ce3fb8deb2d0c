"""The QR code of an invite is the code of exactly its token."""

from __future__ import annotations

import pytest
import segno

from aivillage.cli.invites import QR_BORDER, qr_code
from aivillage.protocols.errors import RequestError

SHAPES = {"\u2588": (0, 0), "\u2580": (0, 1), "\u2584": (1, 0), " ": (1, 1)}
"""Upper and lower module of a character, 1 is dark: drawn is light."""


def modules(picture):
    rows = []
    for line in picture.split("\n"):
        pairs = [SHAPES[character] for character in line]
        rows += [[upper for upper, _ in pairs], [lower for _, lower in pairs]]
    return rows


@pytest.mark.parametrize("characters", [10, 600, 1500])
def test_the_picture_has_the_modules_of_the_code_and_a_quiet_border(characters):
    token = "aiv1." + "Az0-_9" * (characters // 6)
    code = [list(row) for row in segno.make(token, error="l", micro=False).matrix]
    seen = modules(qr_code(token))
    inside = [row[QR_BORDER:-QR_BORDER] for row in seen[QR_BORDER : QR_BORDER + len(code)]]
    assert inside == code
    rest = seen[:QR_BORDER] + seen[QR_BORDER + len(code) :]
    assert len(rest) >= 2 * QR_BORDER
    assert not any(any(row) for row in rest)
    assert not any(any(row[:QR_BORDER] + row[-QR_BORDER:]) for row in seen)


def test_a_token_longer_than_any_code_is_refused_with_a_way_out():
    most = 2953  # bytes in the largest code, at the lowest correction
    assert qr_code("aiv1." + "-" * (most - 5))
    with pytest.raises(RequestError, match="too many for a QR code"):
        qr_code("aiv1." + "-" * (most - 4))
