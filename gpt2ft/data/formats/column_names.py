"""Names that keys of records, columns of tables and keys of messages go by: the one table that layouts are made of.

Of several that a record holds the first counts; the others are then keys that must be empty, repeat it or describe.
"""

PROMPTS = ("prompt", "instruction", "question", "query", "problem", "user", "human", "input")
CONTEXTS = ("input", "context")  # go on with the prompt after a blank line
REPLIES = ("completion", "output", "response", "answer", "reply", "solution", "assistant", "bot", "gpt")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "items", "chat", "data")

# Of a message: the key of its role, with the key that its text usually has beside it, and all keys of a text.
ROLES = {"role": "content", "from": "value", "speaker": "text", "sender": "text", "author": "content"}
TEXTS = ("content", "value", "text", "message", "utterance")
