"""The page's files are served as what they are and nothing else is, whatever lies there."""

import http.client

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from gpt2ft.server import page_files


@pytest.fixture(scope="module")
def with_page(serving, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "page"
    (folder / "parts").mkdir(parents=True)
    for name, text in {
        "index.html": "<!doctype html>é",
        "page.css": "p{}",
        "main.js": "1",
        "icon.svg": "<svg/>",
        "parts/more.js": "2",
        ".hidden": "secret",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "large.bin").write_bytes(bytes(30_000_000))  # more than waits in any buffer on the way
    (folder.parent / "outside.txt").write_text("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2ft.server.service.read_page", lambda: page_files.read_page(folder))
        with serving(key="0123456789abcdef", write_timeout=1000) as running:
            yield running


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/index.html", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/main.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
        ("/parts/more.js", "text/javascript; charset=utf-8"),
    ],
)
def test_files_need_no_key_and_bring_their_policy(with_page, path, kind):
    status, headers, content = with_page.ask(path)
    assert (status, headers["Content-Type"]) == (200, kind)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert content
    assert with_page.ask(path, method="HEAD")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.txt",
        "/%2e%2e/outside.txt",
        "/..%2foutside.txt",
        "/parts/../../outside.txt",
        "/parts/..%5c..%5coutside.txt",
        "//outside.txt",
        "/.hidden",
        "/parts",
        "/parts/",
        "/page.css/",
        "/page.css%00.txt",
        "/INDEX.HTML",
    ],
)
def test_nothing_else_is_there(with_page, path):
    connection = http.client.HTTPConnection("127.0.0.1", with_page.port, timeout=120)
    connection.putrequest("GET", path, skip_host=True)  # as it stands: nothing of the path is tidied
    connection.putheader("Host", "localhost")
    connection.putheader("Authorization", "Bearer 0123456789abcdef")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 404
    assert b"secret" not in response.read()
    connection.close()


def test_who_asks_and_does_not_read_is_hung_up_on(with_page):
    lazy = [with_page.raw(b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(5)]
    assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in lazy)
    assert len(with_page.ask("/large.bin")[2]) == 30_000_000  # who does read gets it all
    assert len(with_page.server.server_state.connections) >= 5
    with_page.skip(1001)
    with_page.until(lambda: not with_page.server.server_state.connections, "the end of their connections")
    for connection in lazy:
        connection.close()


def test_without_a_page_there_is_none(tmp_path):
    assert page_files.read_page(tmp_path / "missing") == {}
