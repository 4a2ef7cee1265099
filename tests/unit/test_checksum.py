"""The Internet checksum, against RFC 1071's own example and its defining property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.checksum import internet_checksum


@pytest.mark.parametrize(
    ("data", "checksum"),
    [("0001f203f4f5f6f7", 0x220D), ("", 0xFFFF), ("0000", 0xFFFF), ("ffff", 0), ("ffffffff", 0), ("01", 0xFEFF)],
)
def test_known_checksums(data: str, checksum: int) -> None:
    assert internet_checksum(bytes.fromhex(data)) == checksum


@given(st.binary(min_size=1))
def test_data_with_its_checksum_sums_to_all_ones(data: bytes) -> None:
    data += bytes(len(data) % 2)
    whole = data + internet_checksum(data).to_bytes(2)
    assert internet_checksum(whole) == 0
