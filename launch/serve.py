"""Serves a model: python launch/serve.py [MODEL] [--port 8000 ...]"""

import sys

from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.scripts import ServeSettings

if __name__ == "__main__":
    settings = parse_script(ServeSettings, "model", sys.argv[1:])
    from gpt2ft.runs import main, serve

    main.run(serve.run, settings)
