# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The server's page in a real browser: text streams in, coloured by exit layer."""

import pytest
from PIL import ImageColor

from nemo_ee.report.style import layer_colours
from tests.support.browser import missing, open_browser
from tests.support.fake_session import FakeSession, confidence_of, layer_of, token_of
from tests.support.server import fake_service, listening, tiny_tokenizer, until

PROMPT = "w1 w2"
TOKENS = "return [...document.querySelectorAll('#output .token')]"
IDLE = "!document.querySelector('#generate').disabled"
BACKGROUND = f"{TOKENS}.map(t => getComputedStyle(t).backgroundColor)"


@pytest.fixture(scope="module")
def browser():
    if reason := missing():
        pytest.skip(reason)
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(browser):
    """The page of a server that takes 20 ms per token; gives browser, session and service."""
    session = FakeSession(slots=2, step_seconds=0.02)
    service = fake_service(session, context_length=210, early_exit={"threshold": 0.6})
    with listening(service) as url:
        browser.open(url)
        browser.wait("return document.querySelectorAll('#legend li').length")
        yield browser, session, service
        browser.open("about:blank")


ALONE = "document.querySelector('#compare').checked = false"


def ids(text):
    return tiny_tokenizer().text_to_ids(text)


def finished(browser):
    return browser.wait("return document.querySelector('#status').textContent")


def test_text_streams_in_coloured_by_exit(page, tmp_path):
    browser, _, _ = page
    browser.run(ALONE)
    browser.type("#prompt", PROMPT)
    browser.type("#max_tokens", "60")
    browser.click("#generate")
    early = len(browser.wait(f"{TOKENS}.map(t => t.title)"))
    assert early < 60, "the first tokens show before the last are there"
    assert browser.run("return document.querySelector('#output').getAttribute('aria-busy')") == "true"
    assert "60 tokens" in finished(browser)
    prompt = ids(PROMPT)
    words = tiny_tokenizer().ids_to_tokens([token_of(prompt, i) for i in range(60)])
    assert browser.run("return document.querySelector('#output').textContent") == "".join(
        f" {w}" for w in words
    )
    layers = [layer_of(prompt, i) for i in range(60)]
    titles = [
        f"layer {layer} of 8, confidence {confidence_of(prompt, i):.2f}" for i, layer in enumerate(layers)
    ]
    assert browser.run(f"{TOKENS}.map(t => t.title)") == titles
    colours = dict(zip(layers, browser.run(BACKGROUND), strict=True))
    of_plots = {n: f"rgb{ImageColor.getrgb(colour)}" for n, colour in layer_colours((2, 4), 8).items()}
    assert colours == {**of_plots, 8: "rgba(0, 0, 0, 0)"}
    assert browser.run(BACKGROUND) == [colours[layer] for layer in layers]
    legend = browser.run("return [...document.querySelectorAll('#legend li')].map(i => i.textContent)")
    names = {2: "layer 2", 4: "layer 4", 8: "all 8 layers"}
    counts = {n: layers.count(n) for n in names}
    assert legend == [f"{names[n]}: {count} ({100 * count / 60:.0f} %)" for n, count in counts.items()]
    swatch = "[...document.querySelectorAll('.swatch')].map(s => getComputedStyle(s).backgroundColor)"
    assert browser.run(f"return {swatch}") == [colours[n] for n in (2, 4, 8)]
    browser.click("#numbers")
    after = browser.run(f"{TOKENS}.map(t => getComputedStyle(t, '::after').content)")
    assert after == [f'"{layer}"' for layer in layers]
    browser.screenshot(tmp_path / "page.png")
    print(f"screenshot: {tmp_path / 'page.png'}")


CLOCK = """
let now = 0;
performance.now = () => { now += 1500; return now; };
"""
"""Every look at the clock is a second and a half later."""


def test_full_depth_stands_beside_the_exits(page):
    """Both with the same tokens, as the session's tokens depend on the prompt alone."""
    browser, session, _ = page
    browser.run(CLOCK)
    assert browser.run("return document.querySelector('#base').textContent") == "tiny"
    browser.type("#prompt", PROMPT)
    browser.type("#max_tokens", "60")
    browser.click("#generate")
    told = browser.wait("return document.querySelector('#comparison').textContent")
    assert told == "With exits: 1.00 x full depth's tokens per second, the same text."
    prompt = ids(PROMPT)
    run = len(prompt) * 8 + sum(layer_of(prompt, i) for i in range(1, 60))
    saved = f"{100 * (1 - run / ((len(prompt) + 59) * 8)):.0f} % of the layers saved"
    texts = [
        browser.run(f"return document.querySelector('#{name}').textContent")
        for name in ("status", "full_status")
    ]
    assert texts == [f"60 tokens in 1.5 s, 40.0 tokens/s; {saved}"] * 2, (
        "the fake session leaves early always"
    )
    shown = [
        browser.run(f"return document.querySelector('#{name}').textContent")
        for name in ("output", "full_output")
    ]
    assert shown[0] == shown[1] != ""
    browser.run(
        "compare(arguments[0], arguments[1])",
        {"pieces": ["a", "b"], "seconds": 1},
        {"pieces": ["a"], "seconds": 2},
    )
    told = browser.run("return document.querySelector('#comparison').textContent")
    assert told == "With exits: 4.00 x full depth's tokens per second, the same text in the first 1 tokens."


def test_controls_reach_the_request(page):
    browser, session, _ = page
    seen = []
    session.token = lambda prompt, i: token_of(prompt, i)
    add = session.add
    session.add = lambda sequences: (seen.extend(sequences), add(sequences))[1]
    browser.type("#prompt", PROMPT)
    browser.type("#max_tokens", "3")
    browser.type("#temperature", "0.5")
    browser.type("#threshold", "0.9")
    browser.click("#exits input[value='2']")
    browser.click("#lossless")
    browser.click("#generate")
    finished(browser)
    request = seen[0].request
    assert (request.exits, request.lossless, seen[0].limit) == ({4: 0.9}, True, 3)
    assert (request.sampling.use_greedy, request.sampling.temperature) == (False, 0.5)
    browser.wait(f"return {IDLE}")
    assert (seen[1].request.exits, seen[1].limit, seen[1].prompt) == ({}, 3, seen[0].prompt), "full depth"
    browser.run("document.querySelector('#mode').value = 'chat'")
    browser.click("#generate")
    until(lambda: len(seen) >= 3)
    assert seen[2].prompt == ids(f"user {PROMPT} <eos> assistant")


def test_stop_cancels(page):
    browser, session, service = page
    browser.type("#prompt", PROMPT)
    browser.type("#max_tokens", "200")
    browser.click("#generate")
    browser.wait(f"{TOKENS}.length > 3")
    browser.click("#stop")
    assert finished(browser).endswith("stopped")
    assert browser.run("return document.querySelector('#full_status').textContent") == "", "nothing follows"
    until(lambda: service.engine.running == 0)
    assert len(session.removed) == 1 and session.steps < 150


def error_after(browser, prompt):
    """What the page says of a prompt that cannot be answered."""
    browser.type("#prompt", prompt)
    browser.click("#generate")
    return browser.wait("return document.querySelector('#error').textContent")


def test_errors_are_shown(page):
    browser, session, _ = page
    error = error_after(browser, "w1 " * 220)
    assert error == "prompt: 220 tokens exceed the server's 210; shorten it"
    session.fail = RuntimeError("broken")
    browser.type("#prompt", PROMPT)
    browser.click("#generate")
    text = "return document.querySelector('#error').textContent.includes('engine failed')"
    assert browser.wait(text)


def test_an_answer_that_breaks_off_is_told(page):
    browser, _, _ = page
    browser.run("window.fetch = async () => new Response('data: {\"choices\": []}\\n\\n')")
    error = error_after(browser, PROMPT)
    assert error == "The connection was closed before the answer was complete."


def test_markup_is_shown_as_text(page):
    """In what a server says of itself, in errors that quote a request, in tokens."""
    browser, _, _ = page
    browser.run("state.model = '<b>x</b>'")
    error = error_after(browser, PROMPT)
    assert error == "model=<b>x</b>: this server has tiny"
    token = "<img src=x onerror=alert(1)>"
    browser.run("showTokens(arguments[0])", {"tokens": [token], "exit_layers": [8], "confidences": [0.5]})
    assert browser.run("return document.querySelector('#output').textContent") == token
    assert browser.run("return document.querySelectorAll('img, b').length") == 0


def test_every_control_has_a_name(page):
    browser, _, _ = page
    browser.run("document.querySelector('#full').hidden = false")  # what is hidden has none
    names = {
        "#prompt": "Prompt",
        "#mode": "Prompt is",
        "#max_tokens": "Tokens at most",
        "#temperature": "Temperature (0 is greedy)",
        "#threshold": "Threshold",
        "#lossless": "Lossless",
        "#compare": "Full depth beside it",
        "#exits input": "2",
        "#generate": "Generate",
        "#stop": "Stop",
        "#numbers": "Show layers as numbers",
        "#output": "Generated text",
        "#full_output": "Text of full depth",
        "#legend": "Tokens by exit layer",
    }
    assert {selector: browser.accessible_name(selector) for selector in names} == names


def test_the_page_asks_for_the_key_of_a_server_that_has_one(browser):
    session = FakeSession()
    asked = "return !document.querySelector('#ask_key').hidden"
    told = "return document.querySelector('#error').textContent"
    listed = "return document.querySelectorAll('#legend li').length"
    with listening(fake_service(session, api_key="sk-page")) as url:
        browser.open(url)
        assert browser.wait(asked) and "asks for an API key" in browser.wait(told)
        assert browser.accessible_name("#key") == "API key"
        browser.type("#key", "sk-wrong")
        browser.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        browser.wait(f"{told}.includes('key is wrong')")
        browser.type("#key", "sk-page")
        browser.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        assert browser.wait(listed) == 3 and browser.run(told) == ""
        browser.type("#prompt", PROMPT)
        browser.click("#generate")
        assert "39 tokens" in finished(browser) and browser.run(f"{TOKENS}.length") == 39
        browser.open("about:blank")
