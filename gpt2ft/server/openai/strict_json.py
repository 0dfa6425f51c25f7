"""JSON by its standard, where Python's own reader is more lenient: no NaN, no name twice, whole characters."""

import json
from typing import Any, NoReturn

from gpt2ft.server.errors import ApiError, invalid

TOO_DEEP = "the body must not be nested this deeply"


def read_object(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds.

    Raises:
        ApiError: if it holds none.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if b"\\u" in body:  # UTF-8 has no halves of surrogate pairs, but escapes can spell them
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise no_json("the body must hold whole characters, but one is half a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise no_json(f"the body must be UTF-8, but is not from byte {error.start} on") from None
    except RecursionError:
        raise no_json(TOO_DEEP) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise no_json(f"the body must be JSON, but is not: {error.msg} at {place}") from None
    except ValueError as error:  # a number of thousands of digits
        raise no_json(f"the body must be JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise no_json("the body must be a JSON object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise no_json(f"the body must be JSON, which knows no {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise no_json("the body must name each parameter once")
    return found


def no_json(message: str) -> ApiError:
    return invalid(message, None, "invalid_json")
