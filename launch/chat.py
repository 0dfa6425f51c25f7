"""Talks with a model: python launch/chat.py [MODEL] [--temperature 0.7 ...]"""

import sys

from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.scripts import ChatSettings

if __name__ == "__main__":
    settings = parse_script(ChatSettings, "model", sys.argv[1:])
    from gpt2ft.runs import chat, main

    main.run(chat.run, settings)
