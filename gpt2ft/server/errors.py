"""Errors that end a request, and what the log holds of failures."""

import logging
import traceback

log = logging.getLogger(__name__)

NUM_FRAMES = 8  # of a traceback that the log shows


class ApiError(Exception):
    """An error that is answered to the client.

    Args:
        status: of the HTTP response; below 500 the client can do something about it.
        code: for programs, such as "rate_limit_exceeded".
        param: the parameter of the request that it is about.
        retry_after: seconds after which it may be worth trying again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """Return the error of a request whose content cannot be served."""
    return ApiError(400, message, code, param)


def overloaded(message: str, retry_after: int) -> ApiError:
    return ApiError(429, message, "rate_limit_exceeded", retry_after=retry_after)


def unavailable(message: str, retry_after: int | None = None) -> ApiError:
    return ApiError(503, message, "service_unavailable", retry_after=retry_after)


def internal(message: str = "something failed that should not: see the server's log") -> ApiError:
    return ApiError(500, message, "internal_error")


def log_failure(error: BaseException) -> None:
    """Log where and as what something failed, without its message: that might hold what people wrote."""
    frames = traceback.extract_tb(error.__traceback__)[-NUM_FRAMES:]
    places = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
    log.error("%s%s", type(error).__name__, places)
