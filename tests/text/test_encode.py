"""Special-token text inside documents stays text."""

import pytest
from transformers import AddedToken

from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.text import BadRow, encode_chat, encode_text
from dgrpo.text import encode as module
from dgrpo.text.encode import chunks

TEMPLATE = (
    "{% for m in messages %}<|end|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(vocab_size=400, names=4)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_ordinary_text_is_encoded_as_the_tokenizer_does(tokenizer):
    text = "import os  # a comment\n\nclass A:\n    pass Biveg"
    assert encode_text(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("quoted", ["<|end|>", "<|pad|>", "<think>"])
def test_control_text_in_a_document_is_text(tokenizer, quoted):
    control = tokenizer.convert_tokens_to_ids(quoted)
    text = f"the token {quoted} ends a line\n{quoted}"
    assert control in tokenizer(text)["input_ids"]  # what happens without care
    ids = encode_text(tokenizer, text)
    assert control not in ids
    assert tokenizer.decode(ids) == text


def test_names_keep_their_tokens_beside_control_text(tokenizer):
    name = tokenizer.convert_tokens_to_ids("Biveg")
    assert name in encode_text(tokenizer, "Biveg <|end|>")


def test_a_target_may_think_but_not_end_itself(tokenizer):
    think, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "<|end|>"))
    ids = encode_text(tokenizer, "<think> x <|end|>", target=True)
    assert think in ids and end not in ids


def test_chat_equals_the_tokenizers_own_where_nothing_is_quoted(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n"}]
    own = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, chat) == own


def test_chat_keeps_its_own_control_tokens_and_no_quoted_ones(tokenizer):
    chat = [{"role": "user", "content": "What does <|end|> mean, 0?"}]
    ids = encode_chat(tokenizer, chat)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids.count(end) == 2  # the user's turn and the assistant's
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )


def test_a_template_that_changes_contents_is_refused_with_quoted_text(tokenizer):
    other = train_tokenizer(vocab_size=300, names=0)
    other.chat_template = "{% for m in messages %}{{ m['content'][:2] }}{% endfor %}"
    with pytest.raises(BadRow, match="changes the contents"):
        encode_chat(other, [{"role": "user", "content": "a <|end|>"}])


def test_a_chat_needs_a_template_and_texts(tokenizer):
    with pytest.raises(ValueError, match="chat_template"):
        encode_chat(train_tokenizer(300, 0), [{"role": "user", "content": "x"}])
    with pytest.raises(BadRow, match="without text content"):
        encode_chat(tokenizer, [{"role": "user", "content": None}])


def test_long_text_is_encoded_in_pieces_to_the_same_ids(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1000)
    text = "def f(x):\n    return x + 12\n\n" * 200
    assert len(text) > 5000 and len(list(chunks(text, 1000))) > 5
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_text(tokenizer, text) == whole


def test_chunks_join_to_the_text_and_cut_before_words():
    text = "ab\n cd\nef gh\n\nij\n" * 7
    pieces = list(chunks(text, 20))
    assert "".join(pieces) == text
    assert all(len(p) <= 20 and not p[0].isspace() for p in pieces)
    assert list(chunks("x" * 45, 20)) == ["x" * 20, "x" * 20, "x" * 5]


def test_a_tokenizer_that_marks_word_starts_is_not_cut(monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(["some words </s> of text\nand more <s> of it\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    monkeypatch.setattr(module, "CHUNK", 1000)
    text = "some words\nand more\n" * 100
    assert encode_text(tokenizer, text) == backend.encode(text, add_special_tokens=False).ids
    ids = encode_text(tokenizer, "some </s> of <s> it")
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)


def test_a_tokenizer_in_python_keeps_quoted_tokens_as_text():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert tokenizer.eos_token_id in tokenizer("a </s>", add_special_tokens=False)["input_ids"]
    ids = encode_text(tokenizer, "a </s> b")
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "a </s> b"
