"""Templates that come with a checkpoint: what they write is control, what people write is words."""

import PIL.Image
import pytest

from sightline.core.errors import CheckpointError, InputError
from sightline.core.geometry import Box, Frame
from sightline.core.sequence import Audio, Image, Message, Piece, Region, Text, Video, ask
from sightline.data.chat_template import ChatTemplate
from sightline.data.template import Control, End, Places, Slot, Words, Writer

RED = Image(PIL.Image.new("RGB", (8, 8), "red"))
CONTROLS = ("<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")
# the form of llava-hf's own
LLAVA = """{% for message in messages %}
{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + eos_token }}{% endgeneration %}
{%- else %}{{ content['text'] + ' ' }}{% endif %}
{%- endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava() -> ChatTemplate:
    return ChatTemplate(LLAVA, CONTROLS, "<image>", "<s>", "</s>")


def test_a_question() -> None:
    wanted = [Control("<s>"), Words("USER: "), Slot(0), Words("\nhow many? ASSISTANT:")]
    assert llava()(ask("how many?", RED)) == wanted


def test_places_and_control_tokens_of_a_program_stand_within_what_is_said() -> None:
    """Of a question, and of an answer, where they are learned."""
    here, there = (Box(x, 0, x + 2, 4, Frame(8, 8), "it") for x in (0, 4))
    parts = (RED, Text("is "), Region(here), Region(there), Text(" a "), Piece("<s>", control=True), Text("cat?"))
    segments = llava()((Message("user", parts), Message("assistant", (Text("no, "), Region(here)))))
    assert segments[1:] == [
        *(Words("USER: "), Slot(0), Words("\nis "), Places((here, there), 0), Words(" a "), Control("<s>")),
        *(Words("cat? ASSISTANT: "), Words("no, ", learned=True), Places((here,), 0, learned=True), End("</s>")),
    ]


def test_a_sound_has_no_form() -> None:
    with pytest.raises(InputError, match="no form for a sound"):
        llava()((Message("user", (Audio([0.0], 16_000),)),))


def test_an_answer_is_learned_with_its_end() -> None:
    talk = (*ask("how many?", RED), Message("assistant", (Text("two"),)))
    tail = llava()(talk)[-3:]
    assert tail == [Words("\nhow many? ASSISTANT: "), Words("two", learned=True), End("</s>")]


def test_a_template_of_plain_text() -> None:
    template = ChatTemplate(CHATML, CONTROLS, "<image>", "", "<|im_end|>")
    wanted = [Control("<|im_start|>"), Words("user\nhi"), Control("<|im_end|>"), Words("\n")]
    assert template(ask("hi")) == [*wanted, Control("<|im_start|>"), Words("assistant\n")]
    with pytest.raises(InputError, match="no place for pictures"):
        template(ask("hi", RED))


@pytest.mark.parametrize("typed", [*CONTROLS, "{{ 7 * 7 }}", "{% raw %}", "\ue0000\ue001", "\ue002", "a</s><image>b"])
def test_what_people_type_is_words(typed: str) -> None:
    segments = llava()(ask(typed, RED))
    assert [type(segment) for segment in segments] == [Control, Words, Slot, Words]
    assert segments[-1] == Words(f"\n{typed} ASSISTANT:")


def test_a_bos_that_the_template_writes_is_not_doubled() -> None:
    template = ChatTemplate("{{ bos_token }}" + CHATML, CONTROLS, "<image>", "<s>", "</s>")
    assert template(ask("hi"))[:2] == [Control("<s>"), Control("<|im_start|>")]


def test_a_bos_that_the_tokenizer_does_not_add() -> None:
    template = ChatTemplate(CHATML, CONTROLS, "<image>", "<s>", "</s>", begins=False)
    assert template(ask("hi"))[0] == Control("<|im_start|>")
    template = ChatTemplate("{{ bos_token }}" + CHATML, CONTROLS, "<image>", "<s>", "</s>", begins=False)
    assert template(ask("hi"))[:2] == [Control("<s>"), Control("<|im_start|>")]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_must_not_do_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template fails"):
        ChatTemplate(source, CONTROLS, "<image>")(ask("hi"))


def test_a_template_that_is_no_program() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate("{% for %}", CONTROLS, "<image>")


def test_a_refusal_is_told() -> None:
    with pytest.raises(InputError, match="the chat template refuses: no systems here"):
        ChatTemplate("{{ raise_exception('no systems here') }}", CONTROLS, "<image>")(ask("hi"))


def test_a_film_s_frames_are_written_as_its_family_does_where_the_template_has_a_name_for_it() -> None:
    def numbered(out: Writer, count: int) -> None:
        for number in range(count):
            out.words(f"{number}: ")
            out.image()

    source = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% else %}{{ '<' + part.type + '>\n' }}{% endif %}{% endfor %}{% endfor %}"
    )
    talk = (Message("user", (Video((RED, RED), (0.0, 1.0)), RED, Text("<video>"))),)
    wanted = [Words("0: "), Slot(0), Words("1: "), Slot(1), Words("\n"), Slot(2), Words("\n<video>")]
    assert ChatTemplate(source, ("<image>",), "<image>", films={"<video>": numbered})(talk) == wanted
    assert ChatTemplate(source, ("<image>",), "<image>")(talk)[:4] == [Slot(0), Words("\n"), Slot(1), Words("\n")]
