"""Messages to tokens: as transformers renders them, and safe from the template's author."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dormouse.domain.errors import InvalidRequest, ModelError
from dormouse.models.chat import ChatModel
from dormouse.models.folder import ModelFolder, open_folder

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "été 🦫 <b>&'\""}]


@pytest.fixture
def folder(tmp_path: Path, byte_level_folder: ModelFolder) -> Path:
    """A copy to be changed, without weights to speak of."""
    path = tmp_path / "model"
    shutil.copytree(byte_level_folder.path, path)
    return path


def with_template(folder: Path, template: Any, **settings: Any) -> ChatModel:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | settings))
    return ChatModel.load(open_folder(folder))


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "bos": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[-1].content }}",
    "whitespace": "  {% if true %}\n    {{ messages[0].content }}\n  {% endif %}\n",
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "namespace": "{% set x = namespace(n=0) %}{% for m in messages %}{% set x.n = 7 %}{% endfor %}{{ x.n }}",
    "prompt": "x{% if add_generation_prompt %}go{% endif %}{% if enable_thinking %}think{% endif %}",
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "<é>"}}}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(folder: Path, name: str) -> None:
    chat = with_template(folder, TEMPLATES[name])
    reference = AutoTokenizer.from_pretrained(folder)
    more: list[dict[str, Any]] = [
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "enable_thinking": True},
    ]
    for options in more:
        expected = reference.apply_chat_template(MESSAGES, tools=TOOLS, return_dict=False, **options)
        assert chat.render(MESSAGES, tools=TOOLS, **options) == expected


def test_a_final_message_can_be_continued(folder: Path) -> None:
    chat = with_template(folder, TEMPLATES["chatml"])
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer"}]
    text = chat.render_text(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe answer")


def test_a_template_that_writes_bos_gets_no_second_one(folder: Path) -> None:
    post = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": post}))
    chat = with_template(folder, TEMPLATES["bos"])
    assert chat.encode("x")[:1] == [1]
    assert chat.encode("x", add_special_tokens=False)[0] != 1
    assert chat.render(MESSAGES).count(1) == 1


HOSTILE = {
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch /tmp/pwned') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "mutation": "{{ messages.append({'role': 'user'}) }}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "syntax": "{% for %}",
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_raises_instead_of_running(folder: Path, name: str) -> None:
    chat = with_template(folder, HOSTILE[name])
    with pytest.raises((ModelError, InvalidRequest)):
        chat.render_text(MESSAGES)


def test_what_is_forbidden_to_read_reads_as_nothing(folder: Path) -> None:
    template = "<{{ raise_exception.__globals__ }}{{ messages | attr('__class__') }}{{ ''.__class__ }}>"
    assert with_template(folder, template).render_text(MESSAGES) == "<>"


def test_what_the_sandbox_forbids_is_the_models_fault(folder: Path) -> None:
    for name in ("class", "syntax"):
        with pytest.raises(ModelError, match="broken or hostile"):
            with_template(folder, HOSTILE[name]).render(MESSAGES)


def test_a_template_may_reject_the_messages_in_its_own_words(folder: Path) -> None:
    chat = with_template(folder, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        chat.render(MESSAGES)
    assert caught.value.param == "messages"
    chat = with_template(folder, "{{ messages[0].content + 1 }}")
    with pytest.raises(InvalidRequest, match="str"):
        chat.render(MESSAGES)
    with pytest.raises(InvalidRequest, match="empty"):
        chat.render([])


@pytest.mark.parametrize("name", ["messages", "self", "conversations", "chat_template"])
def test_variables_cannot_replace_the_renderers_own(byte_level_chat: ChatModel, name: str) -> None:
    variables: dict[str, Any] = {name: "{{ 1 }}"}
    with pytest.raises(InvalidRequest, match=name):
        byte_level_chat.render(MESSAGES, **variables)


def test_null_means_absent(folder: Path) -> None:
    chat = with_template(folder, "{{ messages[0].content }}|{{ 'tool_calls' in messages[0] }}")
    messages = [{"role": "assistant", "content": None, "tool_calls": None}]
    assert chat.render_text(messages) == "|False"


def test_templates_come_from_files_first_and_by_use(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    chat = with_template(folder, named)
    assert chat.render_text(MESSAGES) == "plain"
    assert chat.render_text(MESSAGES, tools=TOOLS) == "tools"
    (folder / "chat_template.jinja").write_text("from a file")
    assert with_template(folder, "from settings").render_text(MESSAGES, tools=TOOLS) == "from a file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    assert ChatModel.load(open_folder(folder)).render_text(MESSAGES, tools=TOOLS) == "for tools"


def test_a_model_without_template_says_so(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        with_template(folder, None).render(MESSAGES)
    (folder / "chat_template.json").write_text('{"chat_template": "old place"}')
    assert with_template(folder, None).render_text(MESSAGES) == "old place"


def test_end_tokens_are_those_that_the_folder_declares(folder: Path) -> None:
    assert ChatModel.load(open_folder(folder)).eos_token_ids == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert ChatModel.load(open_folder(folder)).eos_token_ids == {1, 2}
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    chat = with_template(folder, None, eos_token={"content": "<|endoftext|>"})
    # <|im_end|> is in the vocabulary, but nobody declares that it ends anything.
    assert chat.eos_token_ids == {0}
    assert with_template(folder, None, eos_token=None).eos_token_ids == frozenset()


def test_text_that_is_no_unicode_is_the_senders_mistake(byte_level_chat: ChatModel) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        byte_level_chat.encode("a\ud800b")
    with pytest.raises(InvalidRequest, match="surrogates"):
        byte_level_chat.render([{"role": "user", "content": "\udfff"}])


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path) -> None:
    path = folder / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": truncation}))
    assert len(ChatModel.load(open_folder(folder)).encode("1234567890")) == 10


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ChatModel.load(open_folder(folder))


def test_many_threads_get_the_same_tokens(byte_level_chat: ChatModel) -> None:
    conversations = [[{"role": "user", "content": f"{n} dormice " * n}] for n in range(1, 40)]
    alone = [byte_level_chat.render(messages) for messages in conversations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(byte_level_chat.render, conversations)) == alone
    assert byte_level_chat.vocab_size > max(map(max, alone))
