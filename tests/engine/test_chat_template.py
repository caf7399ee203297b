"""The oracle is transformers' apply_chat_template; the templates are real models'."""

import json
import time
from pathlib import Path

import pytest
import tokenizers
from nybble.engine.chat_sandbox import Limits
from nybble.engine.chat_template import ChatTemplate, find_templates, from_openai
from nybble.engine.errors import ConfigError, RequestError
from tokenizers import models
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).resolve().parents[2] / "../shared/data/fixtures/chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für <b>Städte</b> & 'more'",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city"},
                    "unit": {"type": "string", "enum": ["c", "f"]},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln"}},
}
# Templates that need other variables, or tools in a form of their own: here both sides must raise the same.
WANT_MORE = {"CohereForAI-c4ai-command-r-plus-tool_use.jinja", "fireworks-ai-llama-3-firefunction-v2.jinja"}
USER = {"role": "user", "content": "Hi 你好 <b> & \"quotes\" 'single'\n"}
CONVERSATIONS = {
    "user": ([USER], None),
    "system": ([{"role": "system", "content": "  Be brief. "}, USER], None),
    "turns": ([USER, {"role": "assistant", "content": " b "}, {"role": "user", "content": "c"}], None),
    "ends with the assistant": ([USER, {"role": "assistant", "content": "so"}], None),
    "reasoning": (
        [
            USER,
            {"role": "assistant", "reasoning_content": "hm", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        None,
    ),
    "tools": ([USER], TOOLS),
    "tool call": (
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": "22"},
        ],
        TOOLS,
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "one"}]}], None),
    "unknown role": ([{"role": "owl", "content": "hoot"}], None),
}


def names():
    return sorted(path.name for path in TEMPLATES.glob("*.jinja")) or ["absent"]


@pytest.fixture(scope="module")
def oracle():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def attempt(function, *args, **kwargs):
    """(result, None) or (None, error)."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - a template may raise anything through transformers
        return None, error


@pytest.mark.parametrize("name", names())
def test_real_templates_render_as_in_transformers(name, oracle):
    path = TEMPLATES / name
    if not path.exists():
        pytest.skip("the chat templates of ../shared/data are absent")
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate({"default": source}, SPECIAL)
    rendered = 0
    for messages, tools in CONVERSATIONS.values():
        for prompt, kwargs in ((True, {}), (False, {"enable_thinking": False})):
            options = {"tools": tools, "add_generation_prompt": prompt}
            expected, error = attempt(
                oracle.apply_chat_template,
                messages,
                chat_template=source,
                tokenize=False,
                **options,
                **kwargs,
            )
            text, our_error = attempt(template.render, messages, **options, template_kwargs=kwargs)
            assert text == expected
            assert (our_error is None) == (error is None)
            assert our_error is None or (isinstance(our_error, RequestError) and str(error) in str(our_error))
            rendered += text is not None
    assert rendered or name in WANT_MORE


@pytest.mark.parametrize("content", ["The answer is", "trailing space ", "a\n"])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continued_message_equals_transformers(oracle, content, trim):
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content" + trim + " }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [USER, {"role": "assistant", "content": content}]
    ours = ChatTemplate({"default": source}, SPECIAL).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert ours == oracle.apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert messages[-1]["content"] == content


@pytest.mark.parametrize(
    ("messages", "prompt", "source"),
    [
        ([USER], True, "{{ messages }}"),
        ([{"role": "assistant"}], False, "{{ messages[0].content }}"),
        ([USER], False, "nothing of it"),
    ],
)
def test_messages_that_cannot_be_continued(messages, prompt, source):
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(RequestError, match="continue_final_message"):
        template.render(messages, add_generation_prompt=prompt, continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ (messages|map(attribute='__class__')|list) }}{{ messages[0].__class__() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages.sort() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum(n=10) }}",
        "{{ open('/etc/passwd') }}",
        "{{ joiner.__init__.__builtins__ }}",
        "{{ loop.__class__ }}{% for x in [1] %}{{ loop._iterable.__class__() }}{% endfor %}",
    ],
)
def test_sandbox_holds(source):
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(RequestError):
        template.render([dict(USER)])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ messages | map(attribute='__class__') | join }}",
    ],
)
def test_sandbox_shows_nothing(source):
    assert ChatTemplate({"default": source}, {}).render([USER]) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) if i == -1 %}{% endfor %}" * 2
        + "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ 10**12 * 'x' }}",
        "{{ [1] * 10**10 }}",
        "{{ (9**9999)**9999 }}",
        "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    ],
)
def test_limits(source):
    limits = Limits(cpu_seconds=0.2, output_chars=1_000_000, repeat_items=1_000_000)
    template = ChatTemplate({"default": source}, {}, limits)
    began = time.thread_time()
    with pytest.raises(RequestError, match=r"stopped|Range too big|recursion"):
        template.render([USER])
    assert time.thread_time() - began < 2.0


def test_loop_variables_in_guarded_loops():
    source = (
        "{% for x in xs %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last }} {% endfor %}"
        "{% for x in xs | select('gt', 1) %}{{ x }}{{ ',' if not loop.last }}{% else %}none{% endfor %}"
        "{% for x in undefined_name %}{% else %} empty{% endfor %}"
        "{% for k, v in {'a': 1}.items() %} {{ k }}={{ v }}{% continue %}never{% endfor %}"
    )
    text = ChatTemplate({"default": source}, {}).render([USER], template_kwargs={"xs": [1, 2, 3]})
    assert text == "1/3 2/3 3/3. 2,3 empty a=1"


def test_generation_tag_passes_its_body_on():
    source = "a{% generation %}{{ messages[0].content }}{% endgeneration %}b"
    assert ChatTemplate({"default": source}, {}).render([{"role": "user", "content": "x"}]) == "axb"


def test_the_templates_own_message_is_the_error():
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    with pytest.raises(RequestError) as caught:
        template.render([USER])
    assert caught.value.message == "roles must alternate"


def test_variables():
    template = ChatTemplate({"default": "{{ bos_token }}{{ x }}{{ documents[0].text }}"}, SPECIAL)
    kwargs = {"x": 5, "bos_token": "<other>"}
    assert template.render([USER], documents=[{"text": "d"}], template_kwargs=kwargs) == "<other>5d"
    with pytest.raises(RequestError, match="chat_template_kwargs: 'messages'"):
        template.render([USER], template_kwargs={"messages": []})
    with pytest.raises(RequestError, match="messages is empty"):
        template.render([])


def write(folder, config=None, files=()):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    for name, text in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        (None, [], {}),
        ("A", [], {"default": "A"}),
        (
            [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}],
            [],
            {"default": "A", "rag": "B"},
        ),
        ("A", [("chat_template.jinja", "F")], {"default": "F"}),
        (
            [{"name": "rag", "template": "B"}],
            [("chat_template.jinja", "F"), ("additional_chat_templates/tool_use.jinja", "T")],
            {"default": "F", "tool_use": "T"},
        ),
    ],
)
def test_where_templates_are_found(tmp_path, config, files, expected):
    assert find_templates(write(tmp_path, config, files)) == expected
    assert (ChatTemplate.from_folder(tmp_path, {}) is None) == (not expected)


def test_which_template_is_used(tmp_path):
    write(tmp_path, [{"name": name, "template": name} for name in ("default", "tool_use", "rag")])
    template = ChatTemplate.from_folder(tmp_path, {})
    assert template.render([USER]) == "default"
    assert template.render([USER], tools=TOOLS) == "tool_use"
    assert ChatTemplate.from_folder(tmp_path, {}, "rag").render([USER], tools=TOOLS) == "rag"
    (tmp_path / "own.jinja").write_text("own")
    assert ChatTemplate.from_folder(tmp_path, {}, str(tmp_path / "own.jinja")).render([USER]) == "own"
    assert ChatTemplate.from_folder(tmp_path, {}, "{{ 'inline' }}").render([USER]) == "inline"
    with pytest.raises(ConfigError, match=r"--chat-template 'rga'.*default, rag, tool_use"):
        ChatTemplate.from_folder(tmp_path, {}, "rga")


def test_several_templates_without_a_default(tmp_path):
    write(tmp_path, [{"name": name, "template": name} for name in ("rag", "plain")])
    with pytest.raises(RequestError, match="--chat-template and one of plain, rag"):
        ChatTemplate.from_folder(tmp_path, {}).render([USER])


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ("{% if %}", [], "line 1"),
        ("a\n{{ x | nosuchfilter }}", [], "nosuchfilter"),
        (7, [], "neither a string nor a list"),
        ([{"name": "default"}], [], "neither a string nor a list"),
        (None, [("chat_template.jinja", "x" * (1 << 20) + "y")], "larger than 1 MiB"),
    ],
)
def test_templates_that_cannot_work(tmp_path, config, files, words):
    with pytest.raises(ConfigError, match=words):
        ChatTemplate.from_folder(write(tmp_path, config, files), {})


def test_template_that_is_not_utf8(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        ChatTemplate.from_folder(tmp_path, {})


def test_from_openai():
    wire = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "no"}],
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ],
        },
    ]
    before = json.dumps(wire)
    first, second = from_openai(wire)
    assert first == {"role": "user", "content": "a\nb"}
    assert second["content"] == "no"
    assert second["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert json.dumps(wire) == before


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0"),
        ({"content": ["text"]}, "messages.0.content.0"),
        ({"tool_calls": [{"function": {"arguments": "{"}}]}, "messages.0.tool_calls.0"),
        ({"tool_calls": [{"function": {"arguments": "[1]"}}]}, "messages.0.tool_calls.0"),
    ],
)
def test_messages_that_are_not_openais(message, param):
    with pytest.raises(RequestError) as caught:
        from_openai([{"role": "user", **message}])
    assert caught.value.param == param
