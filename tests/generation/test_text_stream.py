import pytest

from torchtune_fused.generation import HFTokenizer, TextStream

TEXTS = [
    "Hello, world! It's 12:30.",
    "naïve café — “quoted” …",
    "日本語のテキスト, русский, العربية",
    "👍🏽👨‍👩‍👧‍👦 family",
    "  leading and trailing  ",
    "def f(x):\n\n    return x\t# done\n",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return HFTokenizer(smollm2)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_hold_no_half_characters(tokenizer, text):
    stream = TextStream(tokenizer.decode)
    pieces = [stream.put(token) for token in tokenizer.encode(text, add_bos=False, add_eos=False)]
    assert "".join(pieces) == text
    assert stream.end() == ""
    assert len(pieces) > 1


def test_a_character_appears_with_its_last_token(tokenizer):
    tokens = tokenizer.encode("👍", add_bos=False, add_eos=False)
    assert len(tokens) > 1
    stream = TextStream(tokenizer.decode)
    assert [stream.put(token) for token in tokens] == [""] * (len(tokens) - 1) + ["👍"]


def test_the_end_gives_what_was_held_back(tokenizer):
    *most, _ = tokenizer.encode("ok👍", add_bos=False, add_eos=False)
    stream = TextStream(tokenizer.decode)
    assert "".join(stream.put(token) for token in most) == "ok"
    assert set(stream.end()) == {"\ufffd"}
    assert stream.end() == ""


def test_special_tokens_leave_no_text(tokenizer):
    stream = TextStream(tokenizer.decode)
    assert stream.put(tokenizer.eos_id) == ""
    assert stream.end() == ""
