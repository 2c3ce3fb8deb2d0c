"""The owner's settings: layers, and what is said about a wrong one."""

import pytest

from aivillage.models.inference import engine_choice
from aivillage.node.config import Settings, describe, load
from aivillage.node.workers import WorkerSettings
from aivillage.protocols.errors import ConfigError


def write(folder, text):
    (folder / "config.toml").write_text(text, encoding="utf-8")


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path):
    write(tmp_path, "slots = 2\nprice_percent = 2\nheartbeat_seconds = 2")
    environ = {"AIVILLAGE_SLOTS": "3", "AIVILLAGE_PRICE_PERCENT": "3"}
    settings, origins = load(tmp_path, {"slots": 4, "serve": None}, environ)
    assert (settings.slots, settings.price_percent, settings.heartbeat_seconds) == (4, 3, 2.0)
    assert settings.serve is Settings().serve
    origin = {o.key: o.origin for o in origins}
    assert origin["slots"] == "flag"
    assert origin["price_percent"] == "environment"
    assert origin["heartbeat_seconds"] == "config.toml"
    assert origin["serve"] == "default"
    assert set(origin) == set(Settings.__struct_fields__)


def test_an_unknown_key_is_refused_and_the_nearest_one_suggested(tmp_path):
    write(tmp_path, "slot = 2")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {}, {})
    assert "'slot'" in caught.value.message
    assert "config.toml" in caught.value.message
    assert caught.value.next_step == "write 'slots'"


def test_foreign_names_in_the_environment_pass(tmp_path):
    assert load(tmp_path, {}, {"AIVILLAGE_DATA_DIR": "x", "HOME": "y"})[0] == Settings()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('slots = "many"', "slots"),
        ("slots = 0", "slots"),
        ("slots = 257", "slots"),
        ("heartbeat_seconds = 0", "heartbeat_seconds"),
        ("ceiling_micro_credits = -1", "ceiling_micro_credits"),
        ("ceiling_micro_credits = 9007199254740992", "ceiling_micro_credits"),
        ('log_level = "loud"', "log_level"),
        ("enable = 3", "enable"),
        ("enable = [3]", "enable"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place_and_its_meaning(tmp_path, text, key):
    write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {}, {})
    assert caught.value.message.startswith(f"config.toml: {key} does not fit")
    assert caught.value.next_step == f"{key}: {describe()[key]}"


def test_a_wrong_value_in_the_environment_is_not_blamed_on_the_file(tmp_path):
    write(tmp_path, "slots = 2")
    with pytest.raises(ConfigError, match="environment: slots"):
        load(tmp_path, {}, {"AIVILLAGE_SLOTS": "x"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b,c.d", ("a.b", "c.d")), ("a.b", ("a.b",)), ("", ()), (",a.b,", ("a.b",))],
)
def test_a_list_in_the_environment_is_separated_by_commas(tmp_path, text, value):
    assert load(tmp_path, {}, {"AIVILLAGE_ENABLE": text})[0].enable == value


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True)])
def test_a_switch_in_the_environment_is_true_or_false(tmp_path, text, value):
    assert load(tmp_path, {}, {"AIVILLAGE_DEV_MODE": text})[0].dev_mode is value


@pytest.mark.parametrize("body", [b"slots = ", b"\xff\xfe", b"slots = 1\nslots = 2"])
def test_a_file_that_is_no_toml_is_refused_with_a_way_out(tmp_path, body):
    (tmp_path / "config.toml").write_bytes(body)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load(tmp_path, {}, {})
    assert caught.value.next_step


def test_every_setting_is_documented():
    assert set(describe()) == set(Settings.__struct_fields__)
    assert all(len(text) > 5 for text in describe().values())


def test_the_engine_that_nobody_chose_is_one_everywhere():
    assert Settings().engine == WorkerSettings().engine == engine_choice.DEFAULT_ENGINE
