"""Error tests assert facts (names, places, values), so that prose stays cheap to mend."""


def tells(text, facts):
    """Return true if the facts, separated by " ... ", stand in the text in this order."""
    at = 0
    for fact in facts.split(" ... "):
        at = text.find(fact, at)
        if at < 0:
            return False
        at += len(fact)
    return True
