# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chat templates render as transformers renders them, within limits that no template gets round."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nemo_ee.data.chats import chat_rendering
from nemo_ee.data.chats.chat_rendering import RenderingError, prompt_ids, render, render_marked
from tests.support import chat_templates as shapes
from tests.support import hostile_nemo
from tests.support.script import ROOT

TURNS = [
    {"role": "user", "content": "what is <it>?\n\N{SNOWMAN} {{ x }} \ud800"},
    {"role": "assistant", "content": "the 'cat' & \"dog\""},
    {"role": "user", "content": ""},
]
HONEST = {
    **{name: getattr(shapes, name) for name in ("LLAMA_3", "CHATML", "MISTRAL", "MISTRAL_V3", "QWEN_3", "PHI_3")},
    **{name: getattr(shapes, name) for name in ("THINKING_PROMPT", "MARKED", "NO_ENDS")},
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ tools is none }}{% endfor %}",
    "the day": "{{ strftime_now('%Y-%m-%d') }}{{ documents is none }}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "blocks": "  {% for m in messages %}"
    "\n    {{ m['role'] }}\n  {%- endfor %}\n\n{# a comment #}\n  {% if true %}\n  x{% endif %}\n",
    "names": "{{ bos_token }}{{ eos_token }}"
    "{{ undefined_name }}{{ additional_special_tokens }}{{ undefined_name is defined }}",
    "namespace": "{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "a macro": "{% macro say(m) %}<{{ m.role | upper }}>{{ m.content | trim }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", HONEST)
def test_text_is_hugging_faces(name, prompt):
    tokenizer = shapes.tokenizer(HONEST[name], "</s>", "<s>")
    turns = TURNS if name != "json" else [{**turn, "extra": [1, None, {"a": 1.5}]} for turn in TURNS]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    assert render(tokenizer, turns, prompt) == expected


def test_ids_are_hugging_faces():
    tokenizer = shapes.tokenizer(shapes.LLAMA_3, "<|eot_id|>", "<|begin|>")
    turns = [{**turn, "content": turn["content"].replace("\ud800", "")} for turn in TURNS]
    assert prompt_ids(tokenizer, turns) == tokenizer.apply_chat_template(turns, add_generation_prompt=True)


def test_places_of_what_is_generated():
    tokenizer = shapes.tokenizer(shapes.MARKED, "</s>", "<s>")
    text, places = render_marked(tokenizer, TURNS)
    assert [text[start:end] for start, end in places] == ["the 'cat' & \"dog\"<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].no.such }}", "'dict object' has no attribute 'no'"),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_errors_are_hugging_faces(template, message):
    tokenizer = shapes.tokenizer(template, "</s>")
    with pytest.raises(Exception) as theirs:
        tokenizer.apply_chat_template(TURNS, tokenize=False)
    with pytest.raises(RenderingError) as ours:
        render(tokenizer, TURNS)
    assert str(ours.value) == str(theirs.value) == message


def test_a_tokenizer_without_a_template():
    with pytest.raises(RenderingError, match="chat_template is not set"):
        render(shapes.tokenizer(None, "</s>"), TURNS)


SLOW = (
    "range in range",
    "a macro that calls itself twice",
    "a power",
    "a rounding",
    "a megabyte of expressions",
)


class TestHostileTemplates:
    @pytest.mark.parametrize("name", hostile_nemo.TEMPLATES)
    def test_they_are_refused_at_once(self, name, tmp_path, monkeypatch):
        tokenizer = shapes.tokenizer(hostile_nemo.TEMPLATES[name], "</s>")
        monkeypatch.chdir(tmp_path)
        before = os.times()
        with pytest.raises(RenderingError) as error:
            render(tokenizer, TURNS)
        after = os.times()
        assert len(str(error.value)) < 1100 and "\n" not in str(error.value)
        assert ("of the processor" in str(error.value)) == (name in SLOW), error.value
        child = chat_rendering._process._child
        if child is not None:
            with open(f"/proc/{child.pid}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            assert int(status["VmHWM"].split()[0]) / 1024 < 100
        assert after.user - before.user < 0.3  # of this process; the other is ended after half a second
        assert after.children_user - before.children_user < 1.0
        assert os.listdir(tmp_path) == []
        assert render(shapes.tokenizer("{{ messages[0].role }}", "</s>"), TURNS) == "user"

    def test_more_is_allowed_for_more_text(self):
        turns = [{"role": "user", "content": "x" * 10**6}] * 3
        tokenizer = shapes.tokenizer(shapes.CHATML, "</s>")
        assert render(tokenizer, turns) == tokenizer.apply_chat_template(turns, tokenize=False)
        few = [{"role": "user", "content": "x"}]
        with pytest.raises(RenderingError, match="writes more than"):
            render(shapes.tokenizer("{{ 'x' * 3000000 }}", "</s>"), few)

    def test_what_json_cannot_hold_is_refused(self):
        with pytest.raises(RenderingError, match="JSON"):
            render(shapes.tokenizer(shapes.CHATML, "</s>"), [{"role": "user", "content": object()}])


class TestTheProcess:
    def test_a_forked_child_has_one_of_its_own(self):
        tokenizer = shapes.tokenizer("{{ messages[0].content }}", "</s>")
        mine = [{"role": "user", "content": "parent"}]
        assert render(tokenizer, mine) == "parent"
        first = chat_rendering._process._child.pid
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            text = render(tokenizer, [{"role": "user", "content": "child"}])
            os.write(write, f"{text} {chat_rendering._process._child.pid}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        text, second = os.read(read, 100).decode().split()
        assert text == "child" and int(second) != first
        assert render(tokenizer, mine) == "parent" and chat_rendering._process._child.pid == first

    def test_threads_take_turns(self):
        tokenizer, found = shapes.tokenizer("{{ messages[0].content }}", "</s>"), {}

        def ask(number):
            for _ in range(20):
                found.setdefault(number, set()).add(
                    render(tokenizer, [{"role": "user", "content": str(number)}])
                )

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: {str(number)} for number in range(8)}

    def test_it_is_started_again_when_it_was_killed(self):
        tokenizer = shapes.tokenizer("{{ messages[0].content }}", "</s>")
        render(tokenizer, TURNS)
        chat_rendering._process._child.kill()
        chat_rendering._process._child.wait()
        assert render(tokenizer, TURNS) == TURNS[0]["content"]

    def test_who_is_interrupted_leaves_no_answer_to_the_next(self):
        """As by Ctrl-C in a notebook, which goes on."""

        def interrupt(*_):
            raise KeyboardInterrupt

        first = shapes.tokenizer("{{ messages[0].content }}", "</s>")
        render(first, TURNS)
        child = chat_rendering._process._child
        before = signal.signal(signal.SIGALRM, interrupt)
        os.kill(child.pid, signal.SIGSTOP)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                render(first, TURNS)
        finally:
            signal.signal(signal.SIGALRM, before)
            if child.poll() is None:
                os.kill(child.pid, signal.SIGCONT)
        assert render(shapes.tokenizer("{{ messages[0].role }}", "</s>"), TURNS) == "user"

    def test_a_path_that_imports_pass_over(self, monkeypatch, tmp_path):
        """Notebooks put such things there."""
        monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
        found = chat_rendering._Process().ask('{"template": "a", "values": {}, "size": 0}')
        assert found["text"] == "a"

    @pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
    def test_it_ends_with_its_parent(self, end):
        """Also where another process, forked from the parent, has its standard input open."""
        code = (
            "import os, signal, sys, time\n"
            "from nemo_ee.data.chats.chat_rendering import _process\n"
            '_process.ask(\'{"template": "", "values": {}, "size": 0}\')\n'
            "print(_process._child.pid, flush=True)\n"
            "if os.fork() == 0:\n    os.close(1)\n    os.close(2)\n    time.sleep(8)\n    os._exit(0)\n"
            f"{end}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        pid = int(done.stdout)
        deadline = time.monotonic() + 10
        while _runs(pid):
            assert time.monotonic() < deadline, "it outlives its parent"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_that_reach_the_whole_process_group_do_not_end_it(number):
    tokenizer = shapes.tokenizer("{{ messages[0].role }}", "</s>")
    render(tokenizer, TURNS)
    child = chat_rendering._process._child
    os.kill(child.pid, number)
    assert render(tokenizer, TURNS) == "user" and chat_rendering._process._child is child
