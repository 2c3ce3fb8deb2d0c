"""The table of powers."""

import subprocess
import sys

import pytest

from aivillage.models import registry
from aivillage.protocols.errors import RequestError
from aivillage.protocols.pricing import UNITS_MAX


@pytest.mark.parametrize("operation", sorted(registry.BUILT_IN))
def test_every_row_leads_to_a_whole_module(operation):
    module = registry.built_in(operation)
    assert module.name == operation
    assert module.positional in module.Request.__struct_fields__
    assert 0 < len(module.prices_micro_credits()) <= UNITS_MAX
    for method in ("estimate", "meter", "run", "check"):
        assert callable(getattr(module, method))


@pytest.mark.parametrize("operation", sorted(registry.BUILT_IN))
def test_a_built_in_module_imports_nothing_heavy(operation):
    target = registry.BUILT_IN[operation].target.split(":")[0]
    allowed = "set(sys.stdlib_module_names) | {'msgspec', 'typing_extensions', 'aivillage'}"
    code = (
        f"import sys; before = set(sys.modules); import {target}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(n for n in new - ({allowed}) if not n.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_operation_is_a_typed_refusal():
    with pytest.raises(RequestError) as caught:
        registry.entry("no.such")
    assert caught.value.code == "UNKNOWN_OPERATION"


def test_nobody_replaces_one_of_ours(monkeypatch):
    point = registry.importlib.metadata.EntryPoint("mesh.noop", "evil:MODULE", "aivillage.modules")
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [point])
    assert registry.entries()["mesh.noop"].target == "aivillage.models.mesh.noop:MODULE"


def test_only_our_own_modules_that_say_so_are_checked_outside_a_worker():
    assert registry.checks_anywhere("mesh.noop")
    assert not registry.checks_anywhere("inference.generate")  # it reads a tokenizer's file
    assert not registry.checks_anywhere("somebody.elses")
