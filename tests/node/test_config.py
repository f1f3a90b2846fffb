"""Settings: what is unusable, what presets change, and who is heard first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.node.config import (
    PRESETS,
    Config,
    ConfigError,
    is_loopback,
    parse_layers,
    parse_model_layers,
    split_host_port,
)
from mycel.node.settings import describe, parse_size, resolve


def test_defaults_are_usable_and_keep_the_api_on_loopback() -> None:
    config = Config().validate()
    assert is_loopback(split_host_port(config.api)[0])


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_usable_and_change_only_fields_that_exist(preset: str) -> None:
    config = resolve({"preset": preset, "home": "nowhere"}, {})
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value


def test_local_listens_on_loopback_only() -> None:
    assert resolve({"preset": "local", "home": "nowhere"}, {}).listen == ("/ip4/127.0.0.1/tcp/0",)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"preset": "moon"}, "preset"),
        ({"listen": ("4001",)}, "listen"),
        ({"listen": ("/ip4/300.1.1.1/tcp/1",)}, "listen"),
        ({"listen": ("/ip4/127.0.0.1/udp/1",)}, "listen"),
        ({"bootstrap": ("/ip4/127.0.0.1/tcp/1",)}, "bootstrap"),
        ({"api": "127.0.0.1"}, "127.0.0.1"),
        ({"api": "127.0.0.1:70000"}, "api"),
        ({"serve": ("m@3:2",)}, "3:2"),
        ({"silence_s": 0.0}, "silence_s"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"redial_s": 60.0}, "redial_max_s"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"log": "loud"}, "log"),
    ],
)
def test_an_unusable_setting_is_named(setting: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(Config(), **setting).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize("api", ["0.0.0.0:4810", "[::]:4810", "192.168.1.2:4810", "example.org:80"])
def test_an_api_beyond_loopback_wants_a_token(api: str) -> None:
    with pytest.raises(ConfigError, match="api_token"):
        Config(api=api).validate()
    assert Config(api=api, api_token="secret").validate().api == api


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path, source: str) -> None:
    flags: dict[str, object] = {"home": str(tmp_path)}
    environ = {}
    if source == "flag":
        flags["memory_byte"] = "1"
    elif source == "environment":
        environ["MYCEL_MEMORY_BYTE"] = "1"
    else:
        (tmp_path / "config.toml").write_text("memory_byte = 1\n")
    with pytest.raises(ConfigError, match=r"'memory_byte', .* nearest is 'memory_bytes'"):
        resolve(flags, environ)


def test_other_peoples_variables_are_not_ours(tmp_path: Path) -> None:
    assert resolve({"home": str(tmp_path)}, {"MYCELIUM": "x", "LABEL": "y"}).label == ""


def test_a_broken_file_and_a_home_in_it_are_errors_that_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for text in ("label = ", 'home = "/elsewhere"', "label = 3", 'assign = "perhaps"'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=str(path)):
            resolve({"home": str(tmp_path)}, {})


labels = st.text("abc", min_size=1, max_size=5)
times = st.floats(0.001, 1000, allow_nan=False)


@settings(deadline=None)
@given(
    flag=st.none() | times,
    environment=st.none() | times,
    file=st.none() | times,
    preset=st.sampled_from([None, *sorted(PRESETS)]),
    preset_by=st.sampled_from(["flag", "environment", "file"]),
)
def test_flags_go_before_environment_before_file_before_preset_before_default(
    tmp_path_factory: pytest.TempPathFactory,
    flag: float | None,
    environment: float | None,
    file: float | None,
    preset: str | None,
    preset_by: str,
) -> None:
    home = tmp_path_factory.mktemp("home")
    sources: dict[str, dict[str, object]] = {"flag": {}, "environment": {}, "file": {}}
    for source, value in (("flag", flag), ("environment", environment), ("file", file)):
        if value is not None:
            sources[source]["leave_s"] = value
    if preset is not None:
        sources[preset_by]["preset"] = preset
    (home / "config.toml").write_text(
        "".join(f"{key} = {value!r}\n" for key, value in sources["file"].items())
    )
    environ = {f"MYCEL_{key.upper()}": str(value) for key, value in sources["environment"].items()}

    config = resolve({**sources["flag"], "home": str(home)}, environ)

    fallback = PRESETS.get(preset or "lan", {}).get("leave_s", Config().leave_s)
    assert config.leave_s == next((v for v in (flag, environment, file) if v is not None), fallback)
    assert config.preset == (preset or "lan")


@settings(deadline=None)
@given(st.lists(labels, max_size=4), st.booleans(), labels)
def test_environment_and_file_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, serve: list[str], assign: bool, label: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    toml = f"serve = {serve!r}\nassign = {str(assign).lower()}\nlabel = {label!r}\nkv_bytes_max = '2GiB'\n"
    (home / "config.toml").write_text(toml)
    by_file = resolve({"home": str(home)}, {})
    (home / "config.toml").unlink()
    environ = {
        "MYCEL_HOME": str(home),
        "MYCEL_SERVE": ",".join(serve),
        "MYCEL_ASSIGN": str(assign),
        "MYCEL_LABEL": label,
        "MYCEL_KV_BYTES_MAX": "2GiB",
    }
    assert resolve({}, environ) == by_file


def test_the_home_of_flag_goes_before_that_of_the_environment(tmp_path: Path) -> None:
    assert resolve({"home": str(tmp_path / "a")}, {"MYCEL_HOME": str(tmp_path / "b")}).home == tmp_path / "a"


def test_limits_carry_the_deadlines() -> None:
    limits = resolve({"preset": "wan", "home": "nowhere"}, {}).limits()
    assert (limits.dial_s, limits.silence_s) == (10.0, 6.0)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("1024", 1024), ("8GiB", 8 << 30), ("1.5 KiB", 1536), ("2GB", 2 * 10**9), ("3M", 3 * 10**6)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 GiBB", "-1", "1e9", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 the caller words it
        parse_size(text)


def test_layers_and_models() -> None:
    assert parse_layers("0:8") == (0, 8)
    assert parse_model_layers("org/name") == ("org/name", None)
    assert parse_model_layers("org/name@2:4") == ("org/name", (2, 4))
    for text in ("8:0", "1:1", "a:b", "1", "-1:2", "1:2:3"):
        with pytest.raises(ConfigError, match="i:j"):
            parse_layers(text)


def test_every_setting_is_described() -> None:
    assert [name for name, _ in describe()] == [item.name for item in dataclasses.fields(Config)]
