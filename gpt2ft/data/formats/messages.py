"""Lists of messages: {messages: [{role, content}, ...]}, as OpenAI, smoltalk and ultrachat have them, ShareGPT's
{conversations: [{from, value}, ...]}, and {conversation: [...]} of WildChat, LMSYS and Capybara."""

from functools import partial

from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.formats.layout import conversation

MESSAGES = conversation(
    "`messages` conversations",
    partial(chat_messages, key="messages"),
    ("messages",),
    passed_over=("parallel_tool_calls",),  # of OpenAI's fine-tuning: true or false, of tools that are refused
)
SHAREGPT = conversation(
    "ShareGPT `conversations`",
    partial(chat_messages, key="conversations"),
    ("conversations",),
    passed_over=("custom_instruction", "skip_prompt_formatting"),  # of OpenHermes: true or false
)
CONVERSATION = conversation("`conversation` lists", partial(chat_messages, key="conversation"), ("conversation",))
