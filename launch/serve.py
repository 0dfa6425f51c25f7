"""Serves a model: python launch/serve.py [MODEL] [--port 8000 ...]"""

import sys

from gpt2ft.settings import ServeSettings, parse_script

if __name__ == "__main__":
    settings = parse_script(ServeSettings, "model", sys.argv[1:])
    from gpt2ft.runs import main, serve

    main.run(serve.run, settings)
