"""A round of compaction a day, in quiet moments."""

import math
import time

import pytest
import trio

from aivillage.ledger.compaction import Compacted, Cursor
from aivillage.node import caretaker
from aivillage.node.caretaker import Caretaker
from aivillage.node.events import Events
from aivillage.node.jobs import open_jobs


class Book:
    """Three portions a round."""

    def __init__(self):
        self.asked = []

    async def compact(self, cursor):
        self.asked.append(cursor.id)
        after = Cursor("out", cursor.id + 1) if cursor.id < 2 else None
        return Compacted(looked=10, vouchers=3, receipts=2, intents=1, after=after)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(caretaker, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(caretaker, "PAUSE_SECONDS", 0.001)


async def test_a_round_is_all_portions_and_their_sum(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        book, events = Book(), Events()
        done = await Caretaker(book, jobs, events, ()).compact()
        assert book.asked == [0, 1, 2]
        assert (done.looked, done.vouchers, done.receipts, done.intents) == (30, 9, 6, 3)
        assert events.counts["book_compacted"] == 1


async def test_it_is_done_once_a_day_over_restarts_and_not_while_somebody_works(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        work, book, events = ["a job"], Book(), Events()

        async def live(seconds, until=lambda: False):
            keeper = Caretaker(book, jobs, events, (list, lambda: work))
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keeper.run)
                    while not until():
                        await trio.sleep(0.005)
                    nursery.cancel_scope.cancel()

        await live(0.1)
        assert book.asked == []
        work.clear()
        await live(5, lambda: events.counts["book_compacted"] == 1)
        await live(0.1)
        assert book.asked == [0, 1, 2]
        yesterday = time.time() - caretaker.DAY_SECONDS - 1
        await jobs.set_setting(caretaker._SETTING, str(yesterday).encode())
        await live(5, lambda: events.counts["book_compacted"] == 2)
        assert len(book.asked) == 6


async def test_a_patient_round_waits_between_portions(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        work, book = ["a job"], Book()
        keeper = Caretaker(book, jobs, Events(), (lambda: work,))
        async with trio.open_nursery() as nursery:

            async def patient():
                await keeper.compact(patient=True)

            nursery.start_soon(patient)
            await trio.sleep(0.1)
            assert book.asked == [0]
            work.clear()
            with trio.fail_after(5):
                while len(book.asked) < 3:
                    await trio.sleep(0.005)
        assert math.isclose(float(await jobs.setting(caretaker._SETTING)), time.time(), abs_tol=5)
