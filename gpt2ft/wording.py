"""Numbers in sentences."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 step`, `2 steps`, `1,000 replies`.

    Args:
        plural: of a noun that takes more than an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
