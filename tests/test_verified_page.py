"""docs/verification.md says of cheats and honest answers what was measured."""

from __future__ import annotations

import json

import pytest

from tests.house import ROOT

KEPT = json.loads((ROOT / "benchmarks" / "results" / "verified_generation.json").read_text())
PAGE = (ROOT / "docs" / "verification.md").read_text()
KINDS = sorted(
    key.removeprefix("cheats_caught_")
    for key in KEPT
    if key.startswith("cheats_caught_") and not key.endswith(("_bar", "_ok"))
)


def cell(key: str, scale: float = 1, unit: str = "") -> str:
    return f"{scale * KEPT[key]:,.0f}{unit}" if key in KEPT else ""


def row(kind: str) -> str:
    """How the page says it."""
    cells = [
        kind.replace("_", " "),
        cell(f"deviation_min_{kind}_millionths"),
        cell(f"tokens_all_the_same_{kind}", 100, " %"),
        cell(f"cheats_caught_{kind}", 100, " %"),
        cell(f"near_cheats_caught_{kind}", 100, " %"),
    ]
    return "| " + " | ".join(cells).replace("|  |", "| |") + " |"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_cheat_has_its_kept_row(kind):
    assert row(kind).replace("  ", " ") in PAGE.replace("  ", " ")


def test_the_kinds_that_the_mesh_promises_to_catch_were_measured():
    promised = {
        "layer_dropped", "weights_perturbed", "weights_int4", "int8", "bfloat16", "altered_token",
        "truncated", "anothers_result", "wrong_sampler",
    }  # fmt: skip
    assert promised <= set(KINDS)
    assert KEPT["cheats_a_kind"] >= 20


def test_nobody_honest_was_accused_and_looking_is_cheap():
    assert KEPT["honest_answers"] >= 200
    assert f"{KEPT['honest_accused']} of {KEPT['honest_answers']} honest" in PAGE
    assert f"{100 * KEPT['recheck_over_generate']:.0f} % of the CPU time" in PAGE
    assert f"{100 * KEPT['recheck_over_generate_b8']:.0f} % where eight" in PAGE
    assert KEPT["fingerprint_bytes_per_32_tokens"] == 133
