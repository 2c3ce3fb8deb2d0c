"""What nobody can extract, in villages small enough to try it all."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.house import ROOT
from tests.simulation import economy
from tests.simulation.economy import CREDIT, Plan, Village, settle

KEPT = ROOT / "benchmarks" / "results" / "economics.json"
DAYS = 3


def robbed(thieves: int, *, pool: int = 0, owner: str | None = None, invited: bool = False) -> int:
    """What thieves take in three days from four honest members."""
    village = Village(Plan(line=CREDIT // 20, pool=pool, pool_day=pool), ["honest"] * 4)
    for _ in range(thieves):
        village.add("thief", owner) if invited else village.stranger("thief")
    for _ in range(DAYS):
        for thief in village.of("thief"):
            economy.drain(village, thief, village.of("honest"), signs=True)
        for _ in range(24):
            village.pass_hour()
    taken = economy.extracted(village, village.of("thief"))
    assert taken == sum(thief.got for thief in village.of("thief"))
    assert taken <= economy.bound(village, village.of("thief"), DAYS)
    assert economy.sum_of_balances(village) == 0
    return taken


def test_strangers_get_the_pool_and_its_relief_however_many_they_are():
    assert robbed(20) == 0
    few, many = robbed(6, pool=20_000), robbed(30, pool=20_000)
    assert few == many > 0
    assert many <= 4 * 20_000 * (1 + DAYS)


def test_all_devices_of_one_owner_get_one_line_and_each_other_member_its_own():
    line = CREDIT // 20
    assert robbed(1, owner="one", invited=True) == 4 * line
    assert robbed(5, owner="one", invited=True) == 4 * line
    assert robbed(5, invited=True) == 5 * 4 * line


def test_who_never_signs_gets_the_exposure_and_what_heals_a_day():
    village = Village(Plan(line=CREDIT), ["honest"] * 3)
    thief = village.add("thief")
    honest = village.of("honest")
    for _ in range(DAYS):
        economy.drain(village, thief, honest, signs=False)
        for _ in range(24):
            village.pass_hour()
    taken = economy.extracted(village, [thief])
    assert 3 * 20_000 <= taken <= 3 * (20_000 + 5_000 * DAYS)


@pytest.mark.parametrize("clearing", ["none", "hub", "early"])
def test_a_village_with_free_riders_keeps_its_books_and_its_bounds(clearing):
    plan = Plan(size=6, days=2, free=0.3, line=CREDIT // 10, clearing=clearing)
    village = settle(plan)
    village.live()
    riders = village.of("free")
    assert sum(member.refused["line"] for member in riders) > 0, "no line was ever used up"
    assert 0 < economy.extracted(village, riders) <= economy.bound(village, riders, plan.days)
    assert economy.sum_of_balances(village) == 0
    assert economy.mirror_faults(village) == 0
    assert (village.rings > 0) == (clearing != "none")


def test_rings_make_as_much_room_at_once_as_they_moved():
    village = Village(Plan(size=3), ["honest"] * 3)
    debtor, creditor, middle = village.members
    village.work(debtor, creditor, CREDIT)
    village.work(middle, debtor, CREDIT)
    before = creditor.headroom(debtor)
    assert village.clear(debtor, creditor, CREDIT) == CREDIT
    assert creditor.headroom(debtor) == before + CREDIT
    assert (debtor.owes(creditor), middle.owes(creditor)) == (0, CREDIT)


def test_the_kept_figures_are_of_todays_world():
    """After an edit of the world: run benchmarks/economics.py with --save."""
    world = ROOT / "tests" / "simulation" / "economy.py"
    kept = json.loads(KEPT.read_text())
    assert kept["world_sha256"] == hashlib.sha256(world.read_bytes()).hexdigest()


def rows_of_the_page():
    """(key, what the page says) of every cell under a head that names a figure."""
    heads: list[str] = []
    for line in (ROOT / "docs" / "economics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1].startswith("`") and cells[1].endswith("`"):
            heads = [cell.strip("`") for cell in cells[1:]]
        elif line.startswith("| `"):
            name = cells[0].strip("`")
            yield from (
                (f"{name}_{head}", cell) for head, cell in zip(heads, cells[1:], strict=True)
            )


def test_every_figure_in_a_table_of_the_page_is_the_kept_one():
    kept = json.loads(KEPT.read_text())
    cells = list(rows_of_the_page())
    assert len(cells) > 200
    for key, said in cells:
        if said == "-":
            assert key not in kept
            continue
        digits = len(said.partition(".")[2])
        assert said == f"{kept[key]:,.{digits}f}", key
