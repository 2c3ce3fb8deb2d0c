"""docs/verification.md says what was measured."""

from __future__ import annotations

import json

import pytest

from tests.house import ROOT

KEPT = json.loads((ROOT / "benchmarks" / "results" / "verification.json").read_text())
PAGE = (ROOT / "docs" / "verification.md").read_text()
JOBS = (10, 30, 100, 300, 1000)


def percent(part: float) -> str:
    return f"{100 * part:.0f} %"


@pytest.mark.parametrize("rate", [1, 5, 20, 100])
def test_the_curve_of_the_page_is_the_kept_one(rate):
    cells = [percent(KEPT[f"formula_after_{jobs}_jobs_at_{rate}_percent"]) for jobs in JOBS]
    cells.append(percent(KEPT[f"detection_after_100_jobs_at_{rate}_percent"]))
    cells.append(str(KEPT[f"trials_after_100_jobs_at_{rate}_percent"]))
    assert f"| {rate} % | {' | '.join(cells)} |" in PAGE
    patient = percent(KEPT[f"formula_patient_after_100_jobs_at_{rate}_percent"])
    assert f"| {rate} % | {patient} |" in PAGE


def test_what_looking_costs_is_the_kept_figure():
    assert f"results cost {KEPT['overhead_percent_trusted']:.1f} % of those" in PAGE
    assert f"{KEPT['honest_accused']} honest peers were accused in {KEPT['jobs']:,} jobs" in PAGE
