"""YAML in which no key of a mapping is repeated: the plain loader would keep the last value alone."""

from pathlib import Path
from typing import Any

import yaml

from gpt2ft.errors import SettingsError


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        met: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in met:
                raise SettingsError(
                    f"{self.name}: each key must stand once, but `{key.value}` stands again in line "
                    f"{key.start_mark.line + 1}"
                )
            met.add(key.value)
        return node


def load(file: Path) -> Any:
    """Return the value that a file holds.

    Raises:
        SettingsError: if it repeats a key.
        OSError, UnicodeDecodeError, yaml.YAMLError: if it cannot be read.
    """
    loader = _Loader(file.read_text(encoding="utf-8"))
    loader.name = str(file)
    return loader.get_single_data()
