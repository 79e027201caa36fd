"""What a server is started with."""

from __future__ import annotations

import pytest

from gap_export.errors import UsageError
from gap_export.serving.options import ApiKeys, ServeOptions, ServeSettings

KEYS = ["0123456789abcdef", "fedcba9876543210"]


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of the robots\n{KEYS[0]}\n\n  {KEYS[1]}\n")
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_key(host):
    assert not ApiKeys.read(ServeOptions(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "robot"])
def test_any_other_address_needs_keys(host, keys_file):
    with pytest.raises(UsageError, match="--api-keys"):
        ApiKeys.read(ServeOptions(host=host))
    assert ApiKeys.read(ServeOptions(host=host, api_keys=keys_file))


def test_keys_are_found_by_their_place(keys_file):
    keys = ApiKeys.read(ServeOptions(api_keys=keys_file))
    assert [keys.find(key) for key in KEYS] == [0, 1]
    for wrong in ("", KEYS[0][:-1], f"{KEYS[0]}0", "# of the robots", "\u20ac"):
        assert keys.find(wrong) is None


@pytest.mark.parametrize("text", ["", "# only this\n", "short\n", f"{KEYS[0]}\nshort\n"])
def test_a_file_without_good_keys_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match="16 characters"):
        ApiKeys.read(ServeOptions(api_keys=tmp_path / "keys"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "keys", tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            ApiKeys.read(ServeOptions(api_keys=path))


def test_bundles_of_one_name_are_refused(tmp_path):
    settings = ServeSettings(bundles=(tmp_path / "a" / "x", tmp_path / "b" / "x"))
    with pytest.raises(UsageError, match="name of its own"):
        settings.named_bundles()
