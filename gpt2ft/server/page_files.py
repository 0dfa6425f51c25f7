"""The files of the web page. They are read once, when the server starts: no request ever reaches the file system."""

import mimetypes
from pathlib import Path

from starlette.responses import Response

PAGE = Path(__file__).parent / "page"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def read_page(folder: Path = PAGE) -> dict[str, Response]:
    """A response for each path: "/" and "/index.html", "/page.css" and so on. Empty where there is no page."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    pages = {f"/{file.relative_to(folder).as_posix()}": _response(file) for file in files}
    return pages | ({"/": pages["/index.html"]} if "/index.html" in pages else {})


def _response(file: Path) -> Response:
    kind = TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return Response(file.read_bytes(), media_type=kind, headers=HEADERS)
