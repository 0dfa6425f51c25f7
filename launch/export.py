"""Writes a model as others read it: python launch/export.py [MODEL] --format hf|adapter|gguf --output FOLDER"""

import sys

from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.scripts import ExportSettings

if __name__ == "__main__":
    settings = parse_script(ExportSettings, "model", sys.argv[1:])
    from gpt2ft.runs import export, main

    main.run(export.run, settings)
