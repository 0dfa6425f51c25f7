"""Writes a model as others read it: python launch/export.py [MODEL] --format hf|adapter|gguf --output FOLDER"""

import sys

from gpt2ft.settings import ExportSettings, parse_script

if __name__ == "__main__":
    settings = parse_script(ExportSettings, "model", sys.argv[1:])
    from gpt2ft.runs import export, main

    main.run(export.run, settings)
