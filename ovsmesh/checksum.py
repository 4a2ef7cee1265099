"""The checksum of IPv4, ICMP and UDP headers."""


def internet_checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of `data`, whose own checksum field is zero."""
    number = int.from_bytes(data + bytes(len(data) % 2))
    # the one's complement sum of 16-bit words is the number modulo 0xFFFF, except that only zeros sum to zero
    return 0xFFFF - (number and (number - 1) % 0xFFFF + 1)
