"""What is said of settings that do not fit."""


def keys(lines):
    """Return the setting that each line names first."""
    return [line.split("`")[1] for line in lines]
