import json
import re

import pytest
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torchtune import config
from torchtune.data import Message
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from torchtune_fused.generation import HFTokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With what real templates use: macros of Jinja's sandbox, loop controls, dates, JSON, tags.
LLAMA3 = """{{- bos_token }}
{%- if strftime_now is not defined or tools is not none %}
    {{- raise_exception("a helper is missing") }}
{%- endif %}
{%- set ns = namespace(seen=0) %}
{%- for message in messages %}
    {%- if message.role == "ignored" %}
        {%- continue %}
    {%- endif %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("unknown role " ~ message.role) }}
    {%- endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {%- generation %}
    {{- message["content"] | trim + "<|eot_id|>" }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
CHAT = [
    Message("system", "Be brief. {'json': [1, 2]}"),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris — «la ville lumière» 👍."),
    Message("user", "And of Japan?\n\nPlease."),
    Message("assistant", "Tokyo."),
]


def write_tokenizer(folder, template, *, specials, adds_bos=False, **named):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["The capital of France is Paris. user assistant system What is it?\n\n"] * 2,
        trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, special=True) for token in specials],
        ),
    )
    if adds_bos:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return write_tokenizer(
        tmp_path_factory.mktemp("chatml"),
        CHATML,
        specials=specials,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    folder = write_tokenizer(
        tmp_path_factory.mktemp("llama3"),
        LLAMA3,
        specials=[f"<|{name}|>" for name in names],
        adds_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    return folder


@pytest.fixture(params=["chatml", "llama3", "smollm2"])
def folder(request):
    return request.getfixturevalue(request.param)


def as_dicts(messages):
    return [{"role": message.role, "content": message.text_content} for message in messages]


@pytest.mark.parametrize("length", [2, 3, 5])
def test_conversations_are_tokenized_as_by_transformers(folder, length):
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(as_dicts(CHAT[:length]), return_dict=False)
    assert HFTokenizer(folder).tokenize_messages(CHAT[:length])[0] == expected


def test_a_prompt_ends_with_the_header_of_the_answer(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        as_dicts(CHAT[:2]), add_generation_prompt=True, return_dict=False
    )
    ours = HFTokenizer(folder)
    tokens, mask = ours.tokenize_messages(CHAT[:2], add_end_tokens=False)
    assert tokens == expected
    assert all(mask)
    # torchtune's recipes ask for an answer by an empty one.
    empty = [*CHAT[:2], Message("assistant", "")]
    assert ours.tokenize_messages(empty, add_end_tokens=False)[0] == expected


def test_an_answer_that_was_begun_is_left_open(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    begun = [*CHAT[:2], Message("assistant", "The capital is")]
    expected = theirs.apply_chat_template(
        as_dicts(begun), continue_final_message=True, return_dict=False
    )
    assert HFTokenizer(folder).tokenize_messages(begun, add_end_tokens=False)[0] == expected


def test_only_answers_and_the_tokens_that_end_them_count_for_the_loss(folder):
    ours = HFTokenizer(folder)
    tokens, mask = ours.tokenize_messages(CHAT)
    learned = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    end = ours.decode([ours.eos_id], skip_special_tokens=False)
    answers = CHAT[2].text_content + end + CHAT[4].text_content + end
    assert ours.decode(learned, skip_special_tokens=False) == answers


def test_an_answer_may_hold_special_tokens_and_masked_ones_do_not_count(folder):
    ours = HFTokenizer(folder)
    end = ours.decode([ours.eos_id], skip_special_tokens=False)
    other = next(token for token, i in ours.special_tokens.items() if i != ours.eos_id)
    chat = [
        Message("user", "a"),
        Message("assistant", "b", masked=True),
        Message("user", "c"),
        Message("assistant", f"d{other}e"),
    ]
    tokens, mask = ours.tokenize_messages(chat)
    learned = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert ours.decode(learned, skip_special_tokens=False) == f"d{other}e{end}"


def test_a_template_that_rewrites_earlier_answers_is_refused(chatml):
    # Qwen3's template does so: it drops the reasoning of all answers but the last.
    last_answer = "(message.role == 'assistant' and loop.last)"
    rewriting = CHATML.replace(
        "message.content +", f"message.content + ('!' if {last_answer} else '') +"
    )
    ours = HFTokenizer(chatml, chat_template=rewriting)
    assert False in ours.tokenize_messages(CHAT[:3])[1]
    with pytest.raises(ValueError, match="writes message 2 otherwise once it knows what follows"):
        ours.tokenize_messages(CHAT)
    # Nothing is learned from a prompt, so nothing has to be found in it.
    ours.tokenize_messages(CHAT[:4], add_end_tokens=False)


@pytest.mark.parametrize("text", ["Hello, world!", "", "naïve 👍 日本語", "a\n\n b"])
def test_plain_text_is_tokenized_as_by_transformers(folder, text):
    ours, theirs = HFTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text, add_bos=ours.adds_bos, add_eos=False) == theirs(text).input_ids
    tokens = ours.encode(text, add_bos=False, add_eos=False)
    assert tokens == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(tokens) == text


def test_bos_and_eos_are_added_once(llama3):
    ours = HFTokenizer(llama3)
    tokens = ours.encode("Hi")
    assert tokens == [ours.bos_id, *ours.encode("Hi", add_bos=False, add_eos=False), ours.eos_id]
    assert ours.encode("<|begin_of_text|>Hi") == tokens
    assert ours.decode(tokens) == "Hi"
    assert ours.decode(tokens, skip_special_tokens=False) == "<|begin_of_text|>Hi<|eot_id|>"


def test_a_model_without_bos_gets_none(chatml):
    ours = HFTokenizer(chatml)
    assert ours.bos_id is None
    assert not ours.adds_bos
    assert ours.encode("Hi") == [*ours.encode("Hi", False, False), ours.eos_id]


def test_ids_and_stop_tokens_come_from_the_folder(chatml, llama3):
    ours = HFTokenizer(llama3)
    assert ours.special_tokens["<|eot_id|>"] == ours.eos_id == 4
    assert ours.stop_tokens == [4, 1]
    assert ours.pad_id == ours.eos_id
    ours, theirs = HFTokenizer(chatml), AutoTokenizer.from_pretrained(chatml)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.stop_tokens == [theirs.eos_token_id]
    assert ours.vocab_size == len(theirs)


def test_special_tokens_may_be_written_as_objects(llama3, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llama3 / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<|begin_of_text|>", "lstrip": False},
                "eos_token": None,
                "chat_template": [
                    {"name": "rag", "template": "no"},
                    {"name": "default", "template": LLAMA3},
                ],
            }
        )
    )
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    ours = HFTokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.stop_tokens) == (0, 1, [1])
    assert ours.tokenize_messages(CHAT) == HFTokenizer(llama3).tokenize_messages(CHAT)


def test_long_conversations_are_truncated_as_by_torchtune(folder):
    whole, whole_mask = HFTokenizer(folder).tokenize_messages(CHAT)
    ours = HFTokenizer(folder, max_seq_len=20)
    tokens, mask = ours.tokenize_messages(CHAT)
    assert tokens == [*whole[:19], ours.eos_id]
    assert mask == [*whole_mask[:19], True]
    assert ours.tokenize_messages(CHAT, add_end_tokens=False)[0] == whole[:20]
    assert HFTokenizer(folder, max_seq_len=len(whole)).tokenize_messages(CHAT)[0] == whole


def test_it_is_a_torchtune_component_and_transform(folder):
    component = {"_component_": "torchtune_fused.generation.HFTokenizer", "path": str(folder)}
    ours = config.instantiate(OmegaConf.create(component))
    tokens, mask = ours.tokenize_messages(CHAT)
    assert ours({"messages": CHAT, "id": 7}) == {"tokens": tokens, "mask": mask, "id": 7}
    prompt = ours({"messages": CHAT[:2]}, inference=True)
    assert prompt["tokens"] == ours.tokenize_messages(CHAT[:2], add_end_tokens=False)[0]


def test_it_feeds_torchtunes_datasets(folder, tmp_path):
    from torchtune.datasets import chat_dataset

    file = tmp_path / "chats.json"
    file.write_text(json.dumps([{"messages": as_dicts(CHAT[1:3])}]))
    dataset = chat_dataset(
        HFTokenizer(folder),
        source="json",
        data_files=str(file),
        split="train",
        conversation_column="messages",
        conversation_style="openai",
    )
    tokens, mask = HFTokenizer(folder).tokenize_messages(CHAT[1:3])
    assert dataset[0]["tokens"] == tokens
    # -100 is what torchtune's losses ignore.
    assert dataset[0]["labels"] == [-100 if m else t for t, m in zip(tokens, mask, strict=True)]


def test_a_model_without_a_chat_template_says_so(chatml, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((chatml / "tokenizer.json").read_bytes())
    base = HFTokenizer(tmp_path)
    assert base.decode(base.encode("plain text")) == "plain text"
    with pytest.raises(ValueError, match="has no chat template"):
        base.tokenize_messages(CHAT)
    given = HFTokenizer(tmp_path, chat_template=CHATML)
    expected = HFTokenizer(chatml).tokenize_messages(CHAT)
    assert given.tokenize_messages(CHAT)[0] == expected[0]


def test_bad_files_and_messages_are_named(llama3, chatml, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        HFTokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((llama3 / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nope|>"}')
    with pytest.raises(ValueError, match=re.escape("names the token '<|nope|>'")):
        HFTokenizer(tmp_path)
    with pytest.raises(ValueError, match="not valid Jinja"):
        HFTokenizer(llama3, chat_template="{% for %}")
    with pytest.raises(ValueError, match=r"refuses a conversation of \(user, tool\): unknown role"):
        HFTokenizer(llama3).tokenize_messages([CHAT[1], Message("tool", "x")])
    with pytest.raises(ValueError, match="text only"):
        HFTokenizer(llama3).tokenize_messages([Message("user", [{"type": "image", "content": 0}])])


def test_a_template_can_not_leave_its_sandbox(chatml):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses"):
        HFTokenizer(chatml, chat_template=escape).tokenize_messages(CHAT)
    with pytest.raises(ValueError, match="refuses"):
        HFTokenizer(chatml, chat_template="{{ messages.append(1) }}").tokenize_messages(CHAT)
