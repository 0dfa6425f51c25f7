"""Settings of the page."""

from gpt2ft.settings.sections import SamplingSettings

from .visit import expect


def test_settings_are_sent_and_each_version_of_a_reply_draws_anew(visit, server):
    visit.configure(system="Be\nbrief.", temperature="0", top_p="0.8", max_tokens="7", seed="4")
    expect(visit.tab.get_by_text("Be brief.")).to_be_visible()
    for text in ("A drink.", "A leaf."):
        server.will_say(text)
    visit.say("What is tea?")
    visit.button("Retry").click()
    visit.expect_texts("What is tea?", "A leaf.")
    sampling = {"temperature": 0, "top_p": 0.8, "max_tokens": 7}
    assert [body["seed"] for body in visit.asked] == [4, 5]
    assert all(sampling.items() <= body.items() for body in visit.asked)
    assert visit.asked[0]["messages"][0] == {"role": "system", "content": "Be\nbrief."}
    visit.configure(system="", temperature="", top_p="", max_tokens="", seed="")
    server.will_say("Yes.")
    visit.say("Sure?")
    assert set(visit.asked[2]) == {"model", "messages", "stream", "stream_options"}
    assert len(visit.asked[2]["messages"]) == 3


SAMPLING = {"temperature": "1.5", "top_p": "0.8", "top_k": "7", "min_p": "0.1", "repetition_penalty": "1.2"}


def test_every_sampling_setting_of_the_server_is_there_and_shows_its_default(visit, server):
    assert {*SAMPLING, "seed"} == {*SamplingSettings.model_fields}
    defaults = {"temperature": 1.1, "top_p": 0.5, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.3}
    server.restart(**defaults, max_new_tokens=33, max_tokens=44)
    visit.tab.reload()
    expect(visit.tab.get_by_role("heading", name="scripted")).to_be_visible()
    shown = {name: str(value) for name, value in defaults.items()} | {"max_tokens": "33", "seed": ""}
    assert visit.settings(*shown) == shown
    server.will_say("A drink.")
    visit.say("What is tea?")  # what is not changed is not sent: the server may be started with others
    assert not {*shown} & {*visit.asked[0]}
    visit.configure(**SAMPLING, max_tokens="44", seed="5")
    assert visit.settings(*shown) == SAMPLING | {"max_tokens": "44", "seed": "5"}
    server.will_say("Yes.")
    visit.say("And cold?")
    asked = {name: float(value) for name, value in SAMPLING.items()} | {"max_tokens": 44, "seed": 5}
    assert asked.items() <= visit.asked[1].items()
    visit.configure(**dict.fromkeys(shown, ""))
    assert visit.settings(*shown) == shown


def test_a_setting_out_of_range_is_not_taken(visit):
    dialog = visit.tab.get_by_role("dialog", name="Settings")
    for name, value in (
        ("Temperature", "2.1"),
        ("Top p", "0"),
        ("Max tokens", "0"),
        ("Max tokens", "2000"),
        ("Seed", "1.5"),
    ):
        visit.tab.get_by_role("button", name="Settings").click()
        field = dialog.get_by_label(name, exact=True)
        field.fill(value)
        dialog.get_by_role("button", name="Apply").click()
        expect(dialog).to_be_visible()
        expect(field).to_be_focused()
        dialog.get_by_role("button", name="Cancel").click()


def test_light_or_dark_is_the_systems_choice_or_the_persons(visit):
    paper = "getComputedStyle(document.body).backgroundColor"
    visit.tab.emulate_media(color_scheme="light")
    light = visit.tab.evaluate(paper)
    visit.tab.emulate_media(color_scheme="dark")
    dark = visit.tab.evaluate(paper)
    assert light != dark
    visit.tab.get_by_role("button", name="Settings").click()
    visit.tab.get_by_label("Appearance").select_option("Light")
    assert visit.tab.evaluate(paper) == light
    visit.tab.reload()
    assert visit.tab.evaluate(paper) == light
    assert visit.tab.get_by_label("Appearance").input_value() == "light"
