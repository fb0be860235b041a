"""Text that somebody typed never becomes a control token, and honest text is tokenized as llama.cpp would."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import CHATML

from gguforge.quant.metadata import string
from gguforge.runtime.engine import Engine
from gguforge.runtime.library import library, load_model
from gguforge.runtime.prompt import Message, Prompter, StandIns
from gguforge.runtime.template import ChatTemplate, TemplateFailure
from gguforge.runtime.vocabulary import Vocabulary

DATA = Path(__file__).parents[3] / "shared" / "data"
TEMPLATES = {
    "chatml": CHATML,
    "trims": "{% for m in messages %}<|im_start|>{{ m['content'].strip() }}<|im_end|>{% endfor %}",
    "keeps blanks": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} {% endfor %}",
    "cuts thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
        "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
    ),
    "shouts": "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}",
    "no specials": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}### assistant:\n",
    "wants parts": (
        "{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}"
    ),
    "knows no system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    ),
    "drops system": (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
}
TALK = [
    Message("system", " Be kind.\n"),
    Message("user", "  Hi? \n\nBye"),
    Message("assistant", "Élan 日本"),
    Message("user", "a  b"),
]


def prompter(vocabulary: Vocabulary, template: str) -> Prompter:
    return Prompter(vocabulary, {"tokenizer.chat_template": string(template)})


def controls(vocabulary: Vocabulary, tokens: list[int]) -> list[int]:
    return [token for token in tokens if token in vocabulary.forbidden]


def hostile_texts(vocabulary: Vocabulary) -> list[str]:
    texts = []
    for name in vocabulary.specials:
        texts += [name, f"a{name}b", f" {name} ", name + name, f"{name}\n{name}", name[:1] + name + name[1:]]
    return [*texts, " ".join(vocabulary.specials), "".join(vocabulary.specials)]


def test_every_special_token_stays_text(tiny: Engine) -> None:
    vocabulary = tiny.vocabulary
    assert {"<|im_end|>", "</s>", "<think>", "[INST]"} <= set(vocabulary.specials)
    for text in hostile_texts(vocabulary):
        for continues in (False, True):
            tokens = vocabulary.tokenize_plain(text, continues=continues)
            assert not controls(vocabulary, tokens), text
            assert vocabulary.specials["<unk>"] not in tokens
            assert b"".join(map(vocabulary.piece, tokens)).decode().strip() == text.strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_lets_text_become_control(tiny: Engine, name: str) -> None:
    vocabulary, make = tiny.vocabulary, prompter(tiny.vocabulary, TEMPLATES[name])
    honest = controls(vocabulary, make.whole([Message(m.role, "zz") for m in TALK]))
    for text in hostile_texts(vocabulary):
        tokens = make.whole([Message(m.role, text) for m in TALK])
        assert controls(vocabulary, tokens) == honest, text


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "shouts"])
def test_honest_text_is_tokenized_as_llama_cpp_does(tiny: Engine, name: str) -> None:
    """One call over the whole rendered text, control tokens on, is the reference."""
    vocabulary, make = tiny.vocabulary, prompter(tiny.vocabulary, TEMPLATES[name])
    rendered = make._render(TALK)
    assert make.whole(TALK) == vocabulary.with_bos(vocabulary._call(rendered, True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["<|im_", "end|>", "<", "s>", "</", "think>", " ", "\n", "é", "\U000f0000", "[INST", "]"]),
        max_size=8,
    )
)
def test_shreds_of_specials_stay_text(tiny: Engine, shreds: list[str]) -> None:
    vocabulary, text = tiny.vocabulary, "".join(shreds)
    make = prompter(vocabulary, CHATML)
    tokens = make.whole([Message("user", text)])
    assert controls(vocabulary, tokens) == controls(vocabulary, make.whole([Message("user", "zz")]))
    assert "".join(text.split()) in "".join(b"".join(map(vocabulary.piece, tokens)).decode().split())


def test_bos_is_not_doubled(tiny: Engine) -> None:
    vocabulary = tiny.vocabulary
    with_bos = prompter(vocabulary, TEMPLATES["keeps blanks"]).whole(TALK[1:2])
    without = prompter(vocabulary, CHATML).whole(TALK[1:2])
    for tokens in (with_bos, without):
        assert tokens.count(vocabulary.specials["<s>"]) == 1
        assert tokens[0] == vocabulary.specials["<s>"]


@pytest.mark.parametrize("name", ["knows no system", "drops system"])
def test_system_text_is_folded_into_the_first_question(tiny: Engine, name: str) -> None:
    tokens = prompter(tiny.vocabulary, TEMPLATES[name]).whole(TALK[:2])
    text = b"".join(map(tiny.vocabulary.piece, tokens)).decode()
    assert "Be kind." in text
    assert text.index("Be kind.") < text.index("Hi?")


def test_a_template_that_loses_the_question_is_refused(tiny: Engine) -> None:
    with pytest.raises(TemplateFailure, match="leaves out"):
        prompter(tiny.vocabulary, "hello").whole(TALK[1:2])


def test_what_follows_an_answer_completes_the_whole(tiny: Engine) -> None:
    """Prompt + answer + what follows it = the next prompt, where template and tokenizer allow it."""
    vocabulary, make = tiny.vocabulary, prompter(tiny.vocabulary, CHATML)
    first = make.whole(TALK[:2])
    answer = vocabulary.tokenize_plain("Élan 日本", continues=True)
    rest = make.after_answer(TALK)
    assert rest is not None
    assert [*first, *answer, *rest] == make.whole(TALK)


def test_history_that_the_template_rewrites_is_not_continued(tiny: Engine) -> None:
    thinking = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert prompter(tiny.vocabulary, thinking).after_answer(TALK) is None
    thoughtful = [*TALK[:2], Message("assistant", "Yes", thoughts="Hm"), TALK[3]]
    assert prompter(tiny.vocabulary, CHATML).after_answer(thoughtful) is None


def test_stand_ins_survive_a_text_with_more_characters_than_there_are() -> None:
    everything = "".join(chr(code) for code in range(0x10000, 0x31000)) + "<|im_end|>"
    stand_ins = StandIns("<|im_end>")
    hidden = stand_ins.hide(everything)
    assert not set("<|im_end>") & set(hidden)
    assert hidden.translate(stand_ins.plain)[-10:] == "<|im_end|>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 'a' * 2000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999999999) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'aaaaaaaaaaaaaaaa' * 1000 }}{% endfor %}{% endfor %}",
        "{{ raise_exception('not so') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "x" * 300_000,
    ],
)
def test_harmful_templates_are_one_error(source: str) -> None:
    with pytest.raises(TemplateFailure) as caught:
        print(ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], answer=True)[:99])
    assert "\n" not in str(caught.value)


def test_templates_find_what_hugging_face_gives_them() -> None:
    source = (
        "{% generation %}{{ messages | tojson }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    text = ChatTemplate(source, {}).render([{"role": "user", "content": "é<"}], answer=False)
    assert text == '[{"role": "user", "content": "é<"}]41'


@pytest.mark.parametrize("vocab", ["llama-spm", "phi-3", "starcoder", "gpt-2"])
def test_real_templates_with_real_vocabularies(vocab: str) -> None:
    file = DATA / "tokenizers" / "ggml-vocab" / f"ggml-vocab-{vocab}.gguf"
    templates = sorted((DATA / "chat_templates").glob("*.jinja"))
    if not file.exists() or not templates:
        pytest.skip("needs the shared data folder")
    model = load_model(file, vocab_only=True)
    try:
        vocabulary = Vocabulary(model)
        bad = hostile_texts(vocabulary)
        assert not any(controls(vocabulary, vocabulary.tokenize_plain(text)) for text in bad)
        rendered = sum(_check_real_template(vocabulary, path, " ".join(bad)) for path in templates)
        assert rendered >= len(templates) - 1  # one of them wants a list of functions
    finally:
        library().llama_model_free(model)


def _check_real_template(vocabulary: Vocabulary, path: Path, bad: str) -> bool:
    make = prompter(vocabulary, path.read_text(encoding="utf-8"))
    try:
        ours = make.whole(TALK)
    except TemplateFailure:
        return False
    assert ours == vocabulary.with_bos(vocabulary._call(make._render(TALK), True)), path.name
    attacked = make.whole([Message(m.role, bad) for m in TALK])
    honest = make.whole([Message(m.role, "zz") for m in TALK])
    assert controls(vocabulary, attacked) == controls(vocabulary, honest), path.name
    return True


def said(vocabulary: Vocabulary, template: str, messages: list[Message]) -> str:
    """Tokens as the vocabulary spells them; what counts in double braces."""
    tokens, flags = prompter(vocabulary, template).with_answers(messages)
    parts = [
        f"{{{{{vocabulary.text(token)}}}}}" if flag else vocabulary.text(token)
        for token, flag in zip(tokens, flags, strict=True)
    ]
    return "".join(parts).replace("}}{{", "").replace("▁", "_").replace("<0x0A>", "|")


LONG_TALK = [Message("user", "hi"), Message("assistant", "hello user"), Message("user", "a"), Message("assistant", "b")]


ANSWERS = {
    "control tokens around": (
        CHATML,
        "<s><|im_start|>_user|hi<|im_end|>_|<|im_start|>_assistant|{{hello_user<|im_end|>}}_|"
        "<|im_start|>_user|a<|im_end|>_|<|im_start|>_assistant|{{b<|im_end|>}}_|",
    ),
    "blanks around are the answer's, as the prompt ends without": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        " {{ m.content }} <|im_end|>{% endif %}{% endfor %}",
        "<s>[INST]__hi_[/INST]{{_hello_user_<|im_end|>}}[INST]__a_[/INST]{{_b_<|im_end|>}}",
    ),
    "nothing ends an answer, and thoughts are the template's": (
        "{% for m in messages %}{{ m.role }}:{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
        "\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "<s>_user:hi|assistant:<think></think>{{_hello_user}}|user:a|assistant:<think></think>{{_b}}|",
    ),
    "an answer is left out": (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}",
        "<s><|im_start|>_hi<|im_end|><|im_start|>_a<|im_end|><|im_start|>{{_b<|im_end|>}}",
    ),
}


@pytest.mark.parametrize(("template", "wanted"), ANSWERS.values(), ids=ANSWERS)
def test_what_the_assistant_says_counts_in_every_turn(tiny: Engine, template: str, wanted: str) -> None:
    assert said(tiny.vocabulary, template, LONG_TALK) == wanted


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "shouts"])
def test_prompts_are_cut_as_in_a_chat(tiny: Engine, name: str) -> None:
    """Up to each answer the tokens are those that the chat would have read."""
    make = prompter(tiny.vocabulary, TEMPLATES[name])
    tokens, flags = make.with_answers(LONG_TALK)
    assert sum(flags) >= 2
    if "add_generation_prompt" in TEMPLATES[name]:
        prompt = make.whole(LONG_TALK[:1])
        assert tokens[: len(prompt)] == prompt
        assert flags[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_hostile_answers_count_whole(tiny: Engine) -> None:
    """Text that spells control tokens neither ends an answer nor begins one."""
    for text in hostile_texts(tiny.vocabulary):
        tokens, flags = prompter(tiny.vocabulary, CHATML).with_answers(
            [Message("user", text), Message("assistant", text)]
        )
        spoken = [token for token, flag in zip(tokens, flags, strict=True) if flag]
        assert tiny.vocabulary.text(spoken[-1]) == "<|im_end|>"
        assert not controls(tiny.vocabulary, spoken[:-1])
        assert b"".join(map(tiny.vocabulary.piece, spoken[:-1])).decode().split() == text.split()
