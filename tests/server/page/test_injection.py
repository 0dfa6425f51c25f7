"""Whatever is said is text."""

import json

from .visit import expect

PAYLOADS = [
    "<script>alert(1)</script>",
    "<script src=https://evil.invalid/x.js></script>",
    "<img src=x onerror=alert(1)>",
    "<img src=https://evil.invalid/pixel>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<iframe src=javascript:alert(1)>",
    "<object data=https://evil.invalid></object><embed src=https://evil.invalid>",
    "<link rel=stylesheet href=https://evil.invalid/x.css>",
    "<style>@import 'https://evil.invalid/x.css'; * { display: none }</style>",
    "<meta http-equiv=refresh content='0; url=https://evil.invalid'>",
    "<base href=https://evil.invalid/>",
    "<form action=https://evil.invalid><button>Retry</button></form>",
    "<a href=javascript:alert(1)>click</a> [click](javascript:alert(1)) ![](https://evil.invalid/pixel)",
    "<details open ontoggle=alert(1)><input autofocus onfocus=alert(1)>",
    "</p></li></ol></main><h1>Gone</h1>",
    "</textarea></title><!--",
    '"><b>quoted</b>',
    "' onmouseover=alert(1) x='",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;b&#62;",
    "<template><script>alert(1)</script></template><dialog open>Key?</dialog>",
    "${alert(1)} {{constructor.constructor('alert(1)')()}} <%= alert(1) %>",
    "data: [DONE]\n\ndata: {}\n\nevent: error",
    "\u202eright to left\u202c \x00\x07\x1b[31mred\x1b[0m \u2028 \ufeff",
    "$& $1 \\u003cb\\u003e __proto__ constructor",
]


def test_whatever_is_said_is_shown_as_text(visit, server):
    for text in ("A person says this.", *PAYLOADS):
        server.will_say(text)
        visit.say(text)
    said = [text for payload in PAYLOADS for text in (payload, payload)]
    assert visit.texts()[2:] == said
    visit.tab.reload()
    assert visit.texts()[2:] == said
    shape = "(turn) => [...turn.querySelectorAll('*')].map((element) => element.localName).join()"
    turns = f"[...document.querySelectorAll('#turns > li')].map({shape})"
    assert len(set(visit.tab.evaluate(turns))) == 1  # whatever they say


def test_markup_in_all_other_places_is_text_too(visit, server):
    everything = " ".join(PAYLOADS).replace("\n", " ").replace("\x00", "")
    server.restart(name=everything)
    visit.tab.reload()
    visit.configure(system=everything)
    visit.answer_once(status=500, body=json.dumps({"error": {"message": everything}}))
    visit.say(everything)
    expect(visit.trouble).to_contain_text("alert(1)")
    visit.tab.reload()
    visit.button("Edit").click()
    visit.tab.keyboard.press("Escape")
    visit.tab.get_by_role("button", name="Earlier").click()
    expect(visit.tab.get_by_role("heading", name="alert(1)").first).to_be_visible()
    found = visit.tab.evaluate("[...document.querySelectorAll('*')].map((element) => element.localName)")
    assert not set(found) & {"img", "iframe", "object", "embed", "base", "svg", "style", "details", "a", "b"}
    assert visit.tab.evaluate("document.scripts.length") == 2


def test_the_policy_is_in_force(visit):
    """So that its silence in all other tests says something."""
    visit.tab.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.hasRun = true";
          document.body.append(script);
        }"""
    )
    assert visit.tab.evaluate("window.hasRun") is None
    assert "Content Security Policy" in visit.troubles.pop()
