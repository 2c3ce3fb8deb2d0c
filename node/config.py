"""The owner's settings: flag > `AIVILLAGE_*` > config.toml > default, each key documented once."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from aivillage.protocols.errors import ConfigError
from aivillage.protocols.types import AMOUNT_MAX, MicroCredits, Seconds

ENV_PREFIX: Final = "AIVILLAGE_"
CONFIG_FILE: Final = "config.toml"

Amount = Annotated[MicroCredits, Meta(ge=0, le=AMOUNT_MAX)]
Positive = Annotated[Seconds, Meta(gt=0)]


def _doc(text: str) -> Meta:
    return Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an owner can set. The field's description is its documentation."""

    listen: Annotated[str, _doc("address:port for peers (TCP)")] = "0.0.0.0:4051"
    announce: Annotated[
        tuple[str, ...], _doc("addresses to hand out instead of the ones found, host:port")
    ] = ()
    mdns: Annotated[bool, _doc("find villagers on the same network, and be found there")] = True
    dev_mode: Annotated[bool, _doc("development only: debug logs, unsandboxed modules")] = False
    enable: Annotated[tuple[str, ...], _doc("experimental operations to switch on")] = ()
    serve: Annotated[bool, _doc("run other people's jobs")] = True
    slots: Annotated[int, Meta(ge=1, le=256), _doc("jobs of others at the same time")] = 8
    queue_calls: Annotated[
        int,
        Meta(ge=0, le=256),
        _doc("calls of others that wait for a slot, some eight rounds of 8 slots; 0: none waits"),
    ] = 64
    queue_calls_per_peer: Annotated[
        int, Meta(ge=0, le=256), _doc("of these, of one peer: half, so that two do not fill it")
    ] = 32
    queue_seconds: Annotated[
        Seconds,
        Meta(gt=0, le=240),
        _doc("longest that a call waits for a slot: buyers give up after 300 s without work"),
    ] = 120.0
    first_peers: Annotated[
        tuple[str, ...],
        _doc("peers, by the end of their ids, whose turn comes up to four times as often"),
    ] = ()
    module_workers: Annotated[
        int, Meta(ge=1, le=256), _doc("modules that run at once, each in a process; others wait")
    ] = 2
    executor: Annotated[
        str, Meta(pattern="^(local|ray)$"), _doc("where modules run: here, or on a Ray cluster")
    ] = "local"
    ray_address: Annotated[
        str,
        Meta(min_length=1),
        _doc("of the Ray cluster that this machine is part of"),
    ] = "auto"
    price_percent: Annotated[
        int, Meta(ge=0, le=1_000_000), _doc("my prices as a percentage of the default ones")
    ] = 100
    ceiling_micro_credits: Annotated[Amount, _doc("most a job may cost without --max-price")] = (
        100_000
    )
    prefer: Annotated[
        str,
        Meta(pattern="^(fast|balanced|cheap)$"),
        _doc("what a second less is worth when a peer is chosen: 0.1, 0.01 or 0.001 credits"),
    ] = "balanced"
    village_line_micro_credits: Annotated[
        Amount, _doc("most a member of my village may owe me")
    ] = 10_000_000
    village_exposure_micro_credits: Annotated[
        Amount, _doc("the part of it that may be unsigned")
    ] = 20_000
    village_grant_cap_micro_credits: Annotated[
        Amount | None, _doc("most that grants add to a member's line; not set: the line again")
    ] = None
    grant_cap_micro_credits: Annotated[
        Amount, _doc("most that I, a founder, grant within 30 days")
    ] = 100_000_000
    stranger_pool_micro_credits: Annotated[
        Amount, _doc("unsigned work for all strangers together")
    ] = 0
    stranger_day_micro_credits: Annotated[
        Amount, _doc("what strangers together are forgiven a day of what they took")
    ] = 0
    debt_expiry_days: Annotated[
        int,
        Meta(ge=0, le=36_500),
        _doc("a debt that has not moved for so long is written off; 0: never"),
    ] = 0
    netting_seconds: Annotated[
        Positive, _doc("between looks whether what others owe me can pay what I owe")
    ] = 60.0
    verify_percent_max: Annotated[
        int,
        Meta(ge=0, le=1_000),
        _doc("most that checks of results may cost, as a percentage of what jobs do; 0: none"),
    ] = 50
    heartbeat_seconds: Annotated[Positive, _doc("between pings; three misses drop a peer")] = 10.0
    offer_seconds: Annotated[Positive, _doc("between offers; one lives four times as long")] = 30.0
    gossip_bytes_per_second: Annotated[
        int, Meta(ge=1024), _doc("most that offers and ads, mine and others', may send a second")
    ] = 8192
    engine: Annotated[
        str,
        Meta(pattern="^(auto|openvino|torch)$"),
        _doc("what computes answers; auto: openvino where its self-test passes, else torch"),
    ] = "auto"
    device: Annotated[
        str,
        Meta(pattern="^(auto|cpu|cuda(:[0-9]{1,2})?)$"),
        _doc("what engines compute on: cpu, cuda, cuda:N; auto: a GPU where torch can use one"),
    ] = "cpu"
    gpu_memory_mb: Annotated[
        int, Meta(ge=0), _doc("of the GPU's memory, for one engine; 0: nine tenths of it")
    ] = 0
    worker_idle_seconds: Annotated[Positive, _doc("an idle worker process ends after")] = 600.0
    worker_memory_mb: Annotated[int, Meta(ge=256), _doc("data memory of one worker")] = 4096
    worker_cores: Annotated[
        int, Meta(ge=0, le=4096), _doc("processor cores that all workers share; 0: all")
    ] = 0
    worker_threads: Annotated[
        int,
        Meta(ge=1, le=256),
        _doc("threads that an engine computes with; another number is another kernel class"),
    ] = 1
    worker_nice: Annotated[
        int, Meta(ge=0, le=19), _doc("how far workers step back behind other programs")
    ] = 10
    stage_stand_by: Annotated[
        bool, _doc("load layers ahead, unpaid and where there is room, for when a stage is lost")
    ] = True
    stage_pass_on: Annotated[
        bool, _doc("stages of a split answer of yours hand their states on, and so meet each other")
    ] = True
    blob_bytes_max: Annotated[int, Meta(ge=1), _doc("largest blob that is kept here")] = 4 << 30
    blob_store_bytes_max: Annotated[
        int, Meta(ge=1), _doc("all blobs together; the longest unused and unpinned ones make room")
    ] = 16 << 30
    model_bytes_max: Annotated[int, Meta(ge=1), _doc("largest model that is pulled")] = 64 << 30
    models_memory_mb: Annotated[
        int, Meta(ge=0), _doc("memory that loaded models share; 0: half of the machine's")
    ] = 0
    relay: Annotated[bool, _doc("carry bytes for villagers who cannot reach each other")] = True
    relay_circuits: Annotated[
        int, Meta(ge=1, le=1024), _doc("most circuits that are carried at the same time")
    ] = 16
    relay_bytes_per_second: Annotated[
        int, Meta(ge=65_536), _doc("most that is carried in a second, all circuits together")
    ] = 2 << 20
    relay_bytes_a_day: Annotated[
        int, Meta(ge=0), _doc("most that is carried in a day (UTC), all circuits together")
    ] = 2 << 30
    relay_price_micro_credits_per_gib: Annotated[
        Amount, _doc("what whoever is reached through me pays for what I carry; 0: nothing")
    ] = 100_000
    relay_price_max_micro_credits_per_gib: Annotated[
        Amount, _doc("most that I pay a relay; a dearer one is not used")
    ] = 200_000
    through_relay: Annotated[
        str,
        Meta(pattern="^(auto|always|never)$"),
        _doc("be reached through relays; auto: where nobody has dialled this node for a minute"),
    ] = "auto"
    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$"), _doc("log level")] = (
        "info"
    )


class Origin(msgspec.Struct, frozen=True):
    """Where a setting's value comes from."""

    key: str
    value: Any
    origin: str


def describe() -> dict[str, str]:
    """Key -> its one-line documentation."""
    schema = msgspec.json.schema(Settings)["$defs"]["Settings"]["properties"]
    return {key: field.get("description", "") for key, field in schema.items()}


def load(
    data_dir: Path, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> tuple[Settings, list[Origin]]:
    """Settings and where each came from.

    Raises:
        ConfigError: a key is unknown or a value does not fit; says which and what to write.
    """
    layers = (
        ("config.toml", _read_file(data_dir / CONFIG_FILE)),
        ("environment", _read_environment(environ)),
        ("flag", {key: value for key, value in flags.items() if value is not None}),
    )
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in layers:
        for key, value in layer.items():
            _known(key, name)
            values[key], origin[key] = value, name
    settings = _convert(values, origin)
    return settings, [
        Origin(key, getattr(settings, key), origin.get(key, "default")) for key in describe()
    ]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}",
            next_step="mend the file, or move it away to run on defaults",
        ) from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """`AIVILLAGE_DEV_MODE=true`; lists are separated by commas. Foreign names pass."""
    found: dict[str, Any] = {}
    for key in describe():
        text = environ.get(ENV_PREFIX + key.upper())
        if text is not None:
            is_list = isinstance(getattr(Settings(), key), tuple)
            found[key] = [part for part in text.split(",") if part] if is_list else text
    return found


def _known(key: str, layer: str) -> None:
    names = describe()
    if key in names:
        return
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"write {close[0]!r}" if close else "see `aivillage-node config show`"
    raise ConfigError(f"{layer} names an unknown setting {key!r}", next_step=hint)


def _convert(values: dict[str, Any], origin: Mapping[str, str]) -> Settings:
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        key = str(error).rpartition("$.")[2].rstrip("`").partition("[")[0]
        where = origin.get(key, "the configuration")
        raise ConfigError(
            f"{where}: {key or 'a value'} does not fit: {error}",
            next_step=f"{key}: {describe().get(key, 'see `aivillage-node config show`')}",
        ) from None
