"""Talks with a model: python launch/chat.py [MODEL] [--temperature 0.7 ...]"""

import sys

from gpt2ft.settings import ChatSettings, parse_script

if __name__ == "__main__":
    settings = parse_script(ChatSettings, "model", sys.argv[1:])
    from gpt2ft.runs import chat, main

    main.run(chat.run, settings)
