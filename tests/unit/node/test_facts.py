"""Power, other programs and disk, read from folders that look like the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from aivillage.node import facts
from aivillage.node.facts import OtherPrograms


def supply(folder, name, **files):
    (folder / name).mkdir(parents=True)
    for key, text in files.items():
        (folder / name / key).write_text(text + "\n")


MAINS = {"type": "Mains", "online": "1"}
EMPTY = {"type": "Battery", "status": "Discharging"}
FULL = {"type": "Battery", "status": "Full"}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging"}


@pytest.mark.parametrize(
    ("supplies", "known"),
    [
        ([], None),
        ([MAINS], True),
        ([MAINS | {"online": "0"}], False),
        ([MAINS | {"online": "0"}, {"type": "USB", "online": "1"}], True),
        ([EMPTY], False),
        ([FULL], True),
        ([{"type": "Battery", "status": "Unknown"}], None),
        ([MOUSE], None),
        ([MAINS, MOUSE, EMPTY], True),
    ],
)
def test_the_machine_says_whether_it_is_on_mains(tmp_path, supplies, known):
    for number, files in enumerate(supplies):
        supply(tmp_path, f"S{number}", **files)
    assert facts.on_mains(tmp_path) is known


def test_a_machine_without_such_a_folder_does_not_know(tmp_path):
    assert facts.on_mains(tmp_path / "none") is None
    assert OtherPrograms(tmp_path / "none").busy_cores(1.0) is None


def write(proc, busy, own):
    """/proc of a machine where we and one child ran for `own` ticks each."""
    tail = " ".join(["0"] * 30)
    (proc / "stat").write_text(f"cpu {busy} 0 0 999 99 0 0 0 0 0\ncpu0 1 1\n")
    mine = proc / str(os.getpid()) / "task" / "1"
    mine.mkdir(parents=True, exist_ok=True)
    (mine / "children").write_text("77 ")
    for pid in (os.getpid(), 77):
        (proc / str(pid)).mkdir(exist_ok=True)
        fields = "S 1 1 1 0 -1 0 0 0 0 0 " + f"{own} 0 0 0 " + tail
        (proc / str(pid) / "stat").write_text(f"{pid} (a (name) b) {fields}\n")


def test_what_we_and_our_workers_do_is_not_somebody_at_work(tmp_path):
    hertz, others = os.sysconf("SC_CLK_TCK"), OtherPrograms(tmp_path)
    write(tmp_path, busy=0, own=0)
    assert others.busy_cores(0.0) == os.getloadavg()[0]
    write(tmp_path, busy=2000 * hertz, own=1000 * hertz)
    assert others.busy_cores(1000.0) == pytest.approx(0.0, abs=1e-6)
    write(tmp_path, busy=5000 * hertz, own=1000 * hertz)
    assert others.busy_cores(2000.0) == pytest.approx(3.0)
    before = others.busy_cores(2000.0)
    write(tmp_path, busy=5000 * hertz, own=1000 * hertz)
    short = others.busy_cores(2001.0)
    assert 0.85 * before < short < before  # a quiet second is not yet an idle machine


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_real_child_of_ours_does_not_count_as_others():
    others = OtherPrograms()
    others.busy_cores(time.monotonic())
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            time.sleep(1.0)
            family = list(facts._family(facts.PROC, os.getpid()))
            ticks = others._own_ticks(child.pid)
        finally:
            child.kill()
    assert child.pid in family
    assert ticks > 0


def test_the_disk_is_counted_in_blocks_below_the_folders(tmp_path):
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / "file").write_bytes(bytes(10_000))
    (tmp_path / "blobs" / "link").symlink_to(tmp_path / "nowhere")
    wanted = (tmp_path / "blobs", tmp_path / "scratch")
    assert 10_000 <= facts.disk_bytes(wanted) < 30_000
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "more").write_bytes(bytes(50_000))
    assert facts.disk_bytes(wanted) >= 60_000
